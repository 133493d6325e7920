//! Instruction sets: which there are, which this CPU has, and how a loop gets compiled for each.
//!
//! Calling code that uses instructions the CPU lacks is undefined behaviour, so something must
//! prove that it has them. Here a value does: a [`Level`] can only be made by detection, hence
//! holding one proves the capability, and every kernel that takes one is a safe function.
//!
//! A kernel is a struct of its arguments with a `Kernel::run` that is always inlined. The shells
//! at the end of this file are the only functions with `target_feature`; each is generic over the
//! kernel, so the loop is compiled anew inside it. They are never inlined, so that the dispatch
//! costs one call per slice, and so that the disassembly test finds them by name.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "calls functions that need the CPU features a level stands for")
)]

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The variable that forces a level.
pub const ENVIRONMENT: &str = "OXMERGE_SIMD";

/// An instruction set that this CPU has, by construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Set);

/// Private, or anyone could claim a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level this crate was compiled with, the best last.
    #[cfg(target_arch = "x86_64")]
    const COMPILED: &[Self] = &[Self(Set::Portable), Self(Set::Avx2), Self(Set::Avx512)];
    #[cfg(not(target_arch = "x86_64"))]
    const COMPILED: &[Self] = &[Self(Set::Portable)];

    /// The best level of this CPU. Detected once.
    pub fn detect() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::portable()))
    }

    /// The level without any instruction set beyond the target's own.
    pub const fn portable() -> Self {
        Self(Set::Portable)
    }

    /// The levels of this CPU, the best last.
    pub fn available() -> Vec<Self> {
        Self::COMPILED.iter().copied().filter(|level| level.0.is_detected()).collect()
    }

    /// The level of that name, if the CPU has it.
    pub fn forced(name: &str) -> Result<Self> {
        Self::available().into_iter().find(|level| level.name() == name).ok_or_else(|| {
            Error::plan(format!("the SIMD level `{name}` is not available"))
                .expected(format!("one that this CPU has ({})", Self::available_names()))
                .found(format!("`{name}`"))
                .advice(format!("unset {ENVIRONMENT} to use the best one"))
        })
    }

    /// The level that `OXMERGE_SIMD` forces; the best one where it is unset or empty.
    pub fn from_environment() -> Result<Self> {
        match std::env::var_os(ENVIRONMENT) {
            Some(name) if !name.is_empty() => Self::forced(&name.to_string_lossy()),
            _ => Ok(Self::detect()),
        }
    }

    /// The name that [`Level::forced`] takes.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    fn available_names() -> String {
        let names: Vec<_> = Self::available().into_iter().map(Self::name).collect();
        names.join(", ")
    }
}

/// A loop with its arguments.
pub(crate) trait Kernel: Sized {
    type Output;

    /// The loop. Implementations are `#[inline(always)]`, as is all that they call in the loop.
    fn run(self) -> Self::Output;
}

#[inline(never)]
fn portable<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// For each level beyond the portable one: the shell, its detection, and the one place that calls
/// it. A feature list is written once and used for both, so the two cannot drift apart.
macro_rules! shells {
    ($($set:ident => $shell:ident: [$($feature:tt)+];)+) => {
        impl Set {
            fn is_detected(self) -> bool {
                match self {
                    Self::Portable => true,
                    $(#[cfg(target_arch = "x86_64")]
                    Self::$set => true $(&& is_x86_feature_detected!($feature))+,)+
                }
            }
        }

        impl Level {
            /// Runs the kernel as compiled for this level.
            #[inline]
            pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
                match self.0 {
                    Set::Portable => portable(kernel),
                    $(#[cfg(target_arch = "x86_64")]
                    Set::$set => {
                        // SAFETY: a `Level` is only made of sets whose `is_detected` said yes,
                        // which asks for exactly the features that the shell enables.
                        unsafe { $shell(kernel) }
                    })+
                }
            }
        }

        $(#[cfg(target_arch = "x86_64")]
        #[inline(never)]
        $(#[target_feature(enable = $feature)])+
        fn $shell<K: Kernel>(kernel: K) -> K::Output {
            kernel.run()
        })+
    };
}

shells! {
    Avx2 => avx2: ["avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "popcnt"];
    Avx512 => avx512: [
        "avx512f" "avx512bw" "avx512dq" "avx512vl"
        "avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "popcnt"
    ];
}
