//! What the passes over a tensor are compiled to, as text: what is fused can be seen and tested.

use std::fmt::Write;
use std::sync::Arc;

use super::active::{Active, Room};
use super::ahead::HeldRoom;
use super::backend::Backend;
use super::control::Control;
use super::passes::Pass;
use super::simd::Simd;
use super::task::Task;
use super::worker::Worker;
use crate::error::Result;
use crate::kernels::Level;

/// The programs of each pass over `task`, which is run on this thread to have them: what a pass is
/// depends on what those before it found.
pub fn programs(task: Task, level: Level) -> Result<String> {
    let (backend, control) = (Simd(level), Control::default());
    let mut worker = Worker::new(backend.worker()?, &control, usize::MAX, false, level);
    let task = Arc::new(task);
    let (blocks, room) = (task.blocks(), Room::of(&task, u64::MAX));
    let mut text = String::new();
    let rooms = (room, Some(HeldRoom::new(u64::MAX)));
    let Some(mut active) = Active::begin(Arc::clone(&task), blocks, false, true, rooms, None)?
    else {
        return Ok(text);
    };
    loop {
        // Writing to a text does not fail.
        let _ = write!(text, "{}", active.pass);
        while let Some(unit) = active.issue() {
            let (pass, known) = (Arc::clone(&active.pass), Arc::clone(&active.known));
            let found = worker.run(&task, &pass, unit, blocks, &known)?;
            active.take(unit, found);
        }
        if !active.advance()? {
            return Ok(text);
        }
    }
}

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sample { code, .. } => write!(f, "sample\n{code}"),
            Self::Reduce { ahead: Some(ahead), .. } => write!(f, "reduce ahead\n{}", ahead.code),
            Self::Reduce { code, .. } => write!(f, "reduce\n{code}"),
            Self::Locate { code, .. } => write!(f, "locate\n{code}"),
            Self::Rank { code, .. } => write!(f, "rank\n{code}"),
            Self::Rows(code) => write!(f, "rows\n{code}"),
            Self::Columns(code) => write!(f, "columns\n{code}"),
            Self::Bands { code, .. } => write!(f, "bands\n{code}"),
            Self::Combine { code, .. } => write!(f, "combine\n{code}"),
            Self::Arrays => writeln!(f, "arrays"),
            Self::Identical => writeln!(f, "identical"),
        }
    }
}
