//! That the kernels are what they claim to be: vectorised as wide as their level allows, and free
//! of fused multiply-adds, but for one that is made of them.
//!
//! Read from the disassembly of this very binary, which has little else in it: an optimised build
//! is needed and takes its time. `cargo test --release --test disassembly`.

#![cfg(target_arch = "x86_64")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::Command;

use oxmerge::dtype::DType;
use oxmerge::kernels::{
    BinaryOp, Differences, LANES, Level, MaskKey, Operand, Product, SPAN, ThinnedTerm, Tiles,
    UnaryOp, Votes, absolute_sum_into, binary, compare, count, differences_into, dot_into, elect,
    low_rank_bytes, masked, narrow, norms_into, products_into, random_bits, select,
    thinned_sum_bytes, trim, unary, weighted_difference_sum_bytes, weighted_sum,
    weighted_sum_bytes, widen, widen_difference,
};

/// What to look for in the demangled name of a shell: its kernel and types.
const KERNELS: [&str; 24] = [
    "Widen<f32, oxmerge::kernels::convert::Bf16>",
    "WidenDifference<f32, oxmerge::kernels::convert::Bf16>",
    "Narrow<f32, oxmerge::kernels::convert::Bf16>",
    "Binary<f32>",
    UNARY,
    "Select<f32>",
    "WeightedSum<f32, 2",
    "SumBytes<oxmerge::kernels::convert::Bf16, 2",
    "DifferenceBytes<oxmerge::kernels::convert::Bf16, 2",
    "Elect<f32, true, true>",
    "Elect<f32, true, false>",
    "Elect<f32, false, false>",
    "Count<f32>",
    "Trim<f32>",
    "Dot<f32>",
    "AbsoluteSum<f32>",
    "Products<oxmerge::kernels::convert::Bf16>",
    "Norms<oxmerge::kernels::convert::Bf16>",
    "Masked<f32>",
    "Thinned<oxmerge::kernels::convert::Bf16, 2",
    "random::Draw>",
    "Compare<oxmerge::kernels::convert::Bf16, f32>",
    "differences::Add<oxmerge::kernels::convert::Bf16>",
    LOW_RANK,
];
/// The kernel of the exponential and the logarithm.
const UNARY: &str = "Unary<f32>";
/// The kernel that is made of fused multiply-adds.
const LOW_RANK: &str = "LowRank<f32, 4";

/// Makes the compiler keep every kernel of [`KERNELS`], as one that is called with what it does not
/// know, and whose results are wanted.
fn use_kernels(level: Level) {
    let (mut wide, mut stored) = black_box(([0.0_f32; 64], [0; 128]));
    let (halves, bytes) = black_box(([0.5_f32; 64], [0; 128]));
    let (one, threshold) = black_box((1.0, 1));
    widen(level, DType::Bf16, &bytes, &mut wide);
    widen_difference(level, DType::Bf16, &bytes, &halves, &mut wide);
    narrow(level, &wide, DType::Bf16, &mut stored);
    let (a, b) = (Operand::Slice(&halves[..]), Operand::Slice(&halves[..]));
    binary(level, BinaryOp::Add, a, b, &mut wide);
    unary(level, black_box(UnaryOp::Ln), &halves, &mut wide);
    select(level, &halves, a, b, &mut wide);
    weighted_sum(level, &[(one, &halves), (2.0, &halves)], &mut wide);
    let term = (one, DType::Bf16, &bytes[..]);
    weighted_sum_bytes(level, &[term, term], DType::Bf16, &mut stored);
    let base = (DType::Bf16, &bytes[..]);
    weighted_difference_sum_bytes(level, base, &[term, term], 0.5, DType::Bf16, &mut stored);
    for (weight, average) in [(-one, true), (one, true), (one, false)] {
        elect(level, &[(weight, &halves), (2.0, &halves)], average, &mut wide);
    }
    black_box(count(level, &wide, 0, threshold));
    trim(level, &halves, threshold, true, &mut wide);
    let (mut sums, mut products, mut norms) = ([0.0; LANES], [[0.0; LANES]; 3], [[0.0; LANES]; 2]);
    dot_into(level, &wide, &wide, &mut sums);
    absolute_sum_into(level, &wide, &mut sums);
    products_into(level, DType::Bf16, &bytes, &bytes, &mut products);
    let bits = random_bits(level, &MaskKey::new(0, "x", 0), SPAN as u64, 1 << 31);
    norms_into(level, DType::Bf16, &bytes, &bytes, &bits, &mut norms);
    masked(level, &bits, 0.5, &halves, &mut wide);
    let term = ThinnedTerm { weight: 0.5, scale: 2.0, input: &bytes, bits: &bits };
    thinned_sum_bytes(level, DType::Bf16, &bytes, &[term, term], Votes::Elect, one, &mut stored);
    black_box(compare(level, DType::Bf16, &bytes, Some(&stored)));
    let mut differences = Differences::default();
    differences_into(level, DType::Bf16, &bytes, &stored, &mut differences);
    let right = Tiles::new(2, 16);
    let product = Product { left: &halves[..8], right: &right, scale: 0.5 };
    low_rank_bytes(level, base, &[product], 0, 16, DType::Bf16, &mut stored);
    black_box((wide, stored, sums, products, norms, differences));
}

/// The instructions of every function of this binary that is a shell of a level.
fn shells() -> BTreeMap<String, String> {
    let binary = std::env::current_exe().expect("the path of this binary");
    let output = Command::new("objdump")
        .args(["--disassemble", "--demangle", "--no-show-raw-insn"])
        .arg(binary)
        .output()
        .expect("objdump, of binutils");
    let text = String::from_utf8_lossy(&output.stdout);
    let functions = text.split("\n\n").filter_map(|function| {
        let (head, body) = function.trim_start().split_once(">:\n")?;
        head.contains("oxmerge::kernels::level::").then(|| (head.to_owned(), body.to_owned()))
    });
    functions.collect()
}

fn shell<'a>(shells: &'a BTreeMap<String, String>, level: &str, kernel: &str) -> &'a str {
    let name = format!("level::{level}::<");
    let mut found = shells.iter().filter(|(head, _)| head.contains(&name) && head.contains(kernel));
    let (_, body) = found.next().unwrap_or_else(|| {
        panic!(
            "no shell {name}…{kernel}…>; symbols must be mangled with \
             -Csymbol-mangling-version=v0, which RUSTFLAGS may have overridden"
        )
    });
    body
}

/// How many packed arithmetic, comparison or conversion instructions use registers of that name.
fn packed(body: &str, register: &str) -> usize {
    let is_packed = |line: &&str| {
        let mnemonic = line.split_whitespace().nth(1).unwrap_or_default();
        let is_scalar = ["ss", "sd"].iter().any(|suffix| mnemonic.ends_with(suffix));
        !is_scalar && !mnemonic.contains("mov") && !mnemonic.contains("xor")
    };
    body.lines().filter(is_packed).filter(|line| line.contains(register)).count()
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs an optimised build")]
fn disassembly_is_as_wide_as_the_level_and_never_fused() {
    Level::available().into_iter().for_each(use_kernels);
    let shells = shells();
    for kernel in KERNELS {
        for (level, register) in [("portable", "%xmm"), ("avx2", "%ymm"), ("avx512", "%zmm")] {
            if kernel == LOW_RANK && level == "portable" {
                continue; // there each is a call
            }
            let body = shell(&shells, level, kernel);
            let found = packed(body, register);
            assert!(
                found >= 2,
                "{kernel} at {level}: only {found} packed instructions on {register}"
            );
            // The one division is that of the logarithm, whose loop is the longest.
            let divides = |line: &str| line.contains("divpd") && line.contains(register);
            assert!(kernel != UNARY || body.lines().any(divides), "{kernel} at {level}");
        }
    }
    for (name, body) in &shells {
        let fused = body.lines().find(|line| line.contains("vfm") || line.contains("vfnm"));
        let wanted = name.contains("LowRank<") && !name.contains("portable");
        assert_eq!(fused.is_some(), wanted, "{name}: {fused:?}");
    }
}
