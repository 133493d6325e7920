//! The only doors from Python into long work.
//!
//! The work runs on a thread of its own; the calling thread waits without the GIL and wakes up a
//! few times a second to look at signals and to report progress. So Ctrl-C works, and other Python
//! threads go on. A worker touches Python only to compute with torch (`torch.rs`).
//!
//! Work on arrays can be over in less time than that thread takes to start. There the calling thread
//! takes part, and looks at signals between two pieces.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::error::raise;
use super::floats::StandardFloats;
use crate::engine::control::Control;
use crate::engine::memory::check_room_for_a_thread;
use crate::error::{Error, Result};

/// How long a signal may wait.
const TICK: Duration = Duration::from_millis(25);
/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Runs `work`; calls `progress` with (bytes read, bytes written, tensors,
/// current tensor, peak memory in bytes).
///
/// An exception of a signal handler or of `progress` cancels the work, and is raised when the
/// workers have stopped.
pub(super) fn enter<R: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&Control) -> Result<R> + Send,
) -> PyResult<R> {
    check_room_for_a_thread().map_err(|error| raise(py, &error))?;
    let control = Control::default();
    std::thread::scope(|scope| {
        let (done, wait) = sync_channel::<()>(1);
        // Only so that the closure that waits without the GIL may take it along.
        let wait = Mutex::new(wait);
        let wait_a_tick = || match wait.lock() {
            Ok(wait) => wait.recv_timeout(TICK),
            Err(_) => Err(RecvTimeoutError::Disconnected),
        };
        let control = &control;
        let work = move || {
            // Dropped when the work ends, also by a panic: that is what the caller waits for.
            let _done = done;
            let _floats = StandardFloats::set();
            work(control)
        };
        let worker = std::thread::Builder::new()
            .spawn_scoped(scope, work)
            .map_err(|error| raise(py, &Error::io("start a thread", error)))?;
        let mut reported = Instant::now();
        let mut raised = None;
        while let Err(RecvTimeoutError::Timeout) = py.detach(wait_a_tick) {
            let outcome = py.check_signals().and_then(|()| match progress {
                Some(progress) if reported.elapsed() >= PROGRESS_EVERY => {
                    reported = Instant::now();
                    report(progress, control)
                }
                _ => Ok(()),
            });
            if let Err(exception) = outcome {
                control.cancel();
                raised.get_or_insert(exception);
            }
        }
        let result = py.detach(|| worker.join());
        if let Some(exception) = raised {
            return Err(exception);
        }
        result.unwrap_or_else(|_| Err(panicked())).map_err(|error| raise(py, &error))
    })
}

/// Runs `work` on the calling thread, without the GIL; what it runs on other threads is its business.
/// If it is `brief`, another Python thread would not have had its turn before the end, so the GIL is
/// kept.
///
/// An exception of a signal handler cancels the work, and is raised when it has stopped.
pub(super) fn take_part<R: Send>(
    py: Python<'_>,
    brief: bool,
    work: impl FnOnce(&Control) -> Result<R> + Send,
) -> PyResult<R> {
    // Threads that it starts inherit them.
    let _floats = StandardFloats::set();
    let caught = |control: &Control| {
        catch_unwind(AssertUnwindSafe(|| work(control))).unwrap_or_else(|_| Err(panicked()))
    };
    if brief {
        return caught(&Control::default()).map_err(|error| raise(py, &error));
    }
    let raised = Arc::new(Mutex::new(None));
    let noted = Arc::clone(&raised);
    let control = Control::asking(TICK, move || {
        #[expect(
            clippy::redundant_closure_for_method_calls,
            reason = "the method itself is not general enough over the lifetime"
        )]
        let outcome = Python::attach(|py| py.check_signals());
        if let (Err(exception), Ok(mut noted)) = (outcome, noted.lock()) {
            *noted = Some(exception);
            return true;
        }
        false
    });
    let result = py.detach(|| caught(&control));
    if let Some(exception) = raised.lock().ok().and_then(|mut raised| raised.take()) {
        return Err(exception);
    }
    result.map_err(|error| raise(py, &error))
}

#[cold]
fn panicked() -> Error {
    Error::internal("the engine panicked")
}

fn report(progress: &Bound<'_, PyAny>, control: &Control) -> PyResult<()> {
    let now = control.snapshot();
    let peak = crate::engine::memory::peak_resident();
    progress.call1((now.bytes_read, now.bytes_written, now.tensors, now.current, peak))?;
    Ok(())
}
