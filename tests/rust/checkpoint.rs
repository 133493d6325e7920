//! Checkpoints on disk, sound and hostile.
