//! How the processor does floating-point arithmetic, for the time of a call.
//!
//! A program may have told the calling thread to take subnormal numbers for zero, as
//! `torch.set_flush_denormal(True)` does. That would change bits, in this thread and in those that it
//! starts. It also breaks what the compiler takes for granted: that all is as the language left it.

#![cfg_attr(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    expect(unsafe_code, reason = "no safe function reads or writes the control register")
)]

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::arch::asm;
use std::marker::PhantomData;

/// The control register as a program finds it: to nearest, subnormal numbers kept, no traps.
const STANDARD: u64 = if cfg!(target_arch = "x86_64") { 0x1f80 } else { 0 };

/// While it exists, this thread computes as the language says; then again as it did before.
#[derive(Debug)]
pub(super) struct StandardFloats {
    before: u64,
    /// The register belongs to the thread.
    thread: PhantomData<*const ()>,
}

impl StandardFloats {
    pub(super) fn set() -> Self {
        let before = control();
        set_control(STANDARD);
        Self { before, thread: PhantomData }
    }
}

impl Drop for StandardFloats {
    fn drop(&mut self) {
        set_control(self.before);
    }
}

#[cfg(target_arch = "x86_64")]
fn control() -> u64 {
    let mut word = 0_u32;
    // SAFETY: stores the register in `word`, of its size.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags)) };
    word.into()
}

#[cfg(target_arch = "x86_64")]
fn set_control(word: u64) {
    let word = word as u32;
    // SAFETY: the word is the standard one, or one that the register had.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
fn control() -> u64 {
    let word;
    // SAFETY: only reads the register.
    unsafe { asm!("mrs {}, fpcr", out(reg) word, options(nostack, preserves_flags)) };
    word
}

#[cfg(target_arch = "aarch64")]
fn set_control(word: u64) {
    // SAFETY: the word is the standard one, or one that the register had.
    unsafe { asm!("msr fpcr, {}", in(reg) word, options(nostack, preserves_flags)) };
}

// Elsewhere nothing is known to set it, if it exists.

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn control() -> u64 {
    STANDARD
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn set_control(_: u64) {}
