//! Gives changed inputs to the target that `FUZZ_TARGET` names; `run` says how.
#![no_main]
#![expect(clippy::unwrap_used, reason = "a fault in here is told by a panic")]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

#[path = "../rust/fuzzed.rs"]
mod fuzzed;
#[path = "../rust/written.rs"]
mod written;

static TARGET: LazyLock<(fuzzed::Target, TempDir)> = LazyLock::new(|| {
    let wanted = std::env::var("FUZZ_TARGET").unwrap();
    let (_, target) = fuzzed::TARGETS.into_iter().find(|(name, _)| *name == wanted).unwrap();
    (target, tempfile::tempdir().unwrap())
});

fuzz_target!(|bytes: &[u8]| TARGET.0(TARGET.1.path(), bytes));
