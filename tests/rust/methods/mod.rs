//! Methods that are not in the release, written as a newcomer would write them.

pub(crate) mod arcee_fusion;
mod golden;
pub(crate) mod metagpt;
