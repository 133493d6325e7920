//! What the caller and the workers tell each other while a merge runs. No worker waits for it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// Progress out, cancellation in.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    read: AtomicU64,
    written: AtomicU64,
    tensors: AtomicU64,
    kept: AtomicU64,
    current: Mutex<String>,
    question: Option<Question>,
    waits: OnceLock<Waits>,
}

/// What ends the waiting of workers for something other than each other.
struct Waits(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waits")
    }
}

/// Whether to stop, asked of the caller now and then, and on its own thread only.
struct Question {
    owner: ThreadId,
    every: Duration,
    asked: Mutex<Instant>,
    ask: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Question {
    fn answer(&self) -> bool {
        if thread::current().id() != self.owner {
            return false;
        }
        let Ok(mut asked) = self.asked.lock() else { return false };
        let is_due = asked.elapsed() >= self.every;
        if is_due {
            *asked = Instant::now();
        }
        is_due && (self.ask)()
    }
}

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Question").field("every", &self.every).finish_non_exhaustive()
    }
}

pub(crate) fn interrupted() -> Error {
    Error::new(ErrorKind::Interrupted, "interrupted")
}

/// Where a merge stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes of inputs read, re-reads included.
    pub bytes_read: u64,
    /// Bytes of output tensors computed and handed to the writer, or kept from an earlier run.
    pub bytes_written: u64,
    /// Output tensors finished, or kept from an earlier run.
    pub tensors: u64,
    /// Bytes of those that are kept.
    pub bytes_kept: u64,
    /// The tensor that was begun last.
    pub current: String,
}

impl Control {
    /// Asks the workers to stop after the piece in hand.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.end_waits();
    }

    /// Has `end` called when the run is cancelled or fails. It ends what workers may wait for besides
    /// each other, and lets nobody wait for it afterwards. Only Python's fetching has such waits.
    #[cfg(feature = "python")]
    pub(crate) fn on_end(&self, end: impl Fn() + Send + Sync + 'static) {
        self.waits.get_or_init(|| Waits(Box::new(end)));
        if self.cancelled.load(Ordering::SeqCst) {
            self.end_waits();
        }
    }

    /// Nobody is to wait any more: the run has failed.
    pub(crate) fn end_waits(&self) {
        if let Some(Waits(end)) = self.waits.get() {
            end();
        }
    }

    /// For a caller that works itself: between two pieces it is asked, on the thread that calls this
    /// and not more often than `every`, whether to stop.
    pub fn asking(every: Duration, ask: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        let (owner, asked) = (thread::current().id(), Mutex::new(Instant::now()));
        let question = Some(Question { owner, every, asked, ask: Box::new(ask) });
        Self { question, ..Self::default() }
    }

    /// Whether the caller asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// An error if the caller asked to stop; one that works itself is asked first. Call it without
    /// a lock.
    pub(crate) fn check(&self) -> Result<()> {
        if self.question.as_ref().is_some_and(Question::answer) {
            self.cancel();
        }
        if self.is_cancelled() { Err(interrupted()) } else { Ok(()) }
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            bytes_read: self.read.load(Ordering::Relaxed),
            bytes_written: self.written.load(Ordering::Relaxed),
            tensors: self.tensors.load(Ordering::Relaxed),
            bytes_kept: self.kept.load(Ordering::Relaxed),
            current: self.current.lock().map(|name| name.clone()).unwrap_or_default(),
        }
    }

    pub(crate) fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn finish_tensors(&self, count: u64) {
        self.tensors.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts what an earlier run has finished as done.
    pub(crate) fn keep(&self, tensors: u64, bytes: u64) {
        self.finish_tensors(tensors);
        self.add_written(bytes);
        self.kept.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn begin_tensor(&self, name: &str) {
        if let Ok(mut current) = self.current.lock() {
            current.clear();
            current.push_str(name);
        }
    }
}
