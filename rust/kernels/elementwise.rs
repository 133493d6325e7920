//! Arithmetic and comparisons, one element at a time.
//!
//! An operand is a slice or one number for all elements. Each pair of kinds gets a loop of its
//! own, so that a scalar sits in a register and no test is left inside the loop.

use super::level::{Kernel, Level};
use super::real::Real;

/// A slice, or one value for every element.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a, T> {
    /// A value per element.
    Slice(&'a [T]),
    /// The same value throughout.
    Scalar(T),
}

impl<T> Operand<'_, T> {
    fn check(&self, what: &str, length: usize) {
        if let Self::Slice(slice) = self {
            assert_eq!(slice.len(), length, "{what} and the output must have the same length");
        }
    }
}

/// An operation on two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinaryOp {
    /// `a + b`
    Add,
    /// `a − b`
    Sub,
    /// `a · b`
    Mul,
    /// `a ÷ b`
    Div,
    /// The greater; +0 above −0; NaN if either is.
    Max,
    /// The lesser; −0 below +0; NaN if either is.
    Min,
    /// 1 where `a > b`, else 0.
    Greater,
    /// 1 where `a ≥ b`, else 0.
    GreaterEqual,
    /// 1 where `a = b`, else 0. The zeros are equal; NaN equals nothing.
    Equal,
}

impl BinaryOp {
    /// Every operation.
    pub const ALL: [Self; 9] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Div,
        Self::Max,
        Self::Min,
        Self::Greater,
        Self::GreaterEqual,
        Self::Equal,
    ];
}

/// An operation on one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaryOp {
    /// `−a`
    Neg,
    /// `|a|`
    Abs,
    /// −1, +0 or +1; NaN for NaN.
    Sign,
    /// `√a`
    Sqrt,
    /// `eᵃ`.
    Exp,
    /// `ln a`.
    Ln,
}

impl UnaryOp {
    /// Every operation.
    pub const ALL: [Self; 6] = [Self::Neg, Self::Abs, Self::Sign, Self::Sqrt, Self::Exp, Self::Ln];
}

/// An operand inside a loop.
trait Side<T>: Copy {
    fn at(self, index: usize) -> T;
}

impl<T: Copy> Side<T> for &[T] {
    #[inline(always)]
    fn at(self, index: usize) -> T {
        self[index]
    }
}

#[derive(Clone, Copy)]
struct Splat<T>(T);

impl<T: Copy> Side<T> for Splat<T> {
    #[inline(always)]
    fn at(self, _: usize) -> T {
        self.0
    }
}

/// One loop for each pair of operand kinds. The slices are cut to the output's length first, which
/// spares the loop its bounds checks.
#[inline(always)]
fn zip<T: Real>(a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T], f: impl Fn(usize, T, T) -> T) {
    #[inline(always)]
    fn each<T: Real>(
        a: impl Side<T>,
        b: impl Side<T>,
        out: &mut [T],
        f: impl Fn(usize, T, T) -> T,
    ) {
        for (index, value) in out.iter_mut().enumerate() {
            *value = f(index, a.at(index), b.at(index));
        }
    }
    let length = out.len();
    match (a, b) {
        (Operand::Slice(a), Operand::Slice(b)) => each(&a[..length], &b[..length], out, f),
        (Operand::Slice(a), Operand::Scalar(b)) => each(&a[..length], Splat(b), out, f),
        (Operand::Scalar(a), Operand::Slice(b)) => each(Splat(a), &b[..length], out, f),
        (Operand::Scalar(a), Operand::Scalar(b)) => each(Splat(a), Splat(b), out, f),
    }
}

struct Binary<'a, T> {
    op: BinaryOp,
    a: Operand<'a, T>,
    b: Operand<'a, T>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Binary<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { op, a, b, out } = self;
        match op {
            BinaryOp::Add => zip(a, b, out, |_, a, b| a + b),
            BinaryOp::Sub => zip(a, b, out, |_, a, b| a - b),
            BinaryOp::Mul => zip(a, b, out, |_, a, b| a * b),
            BinaryOp::Div => zip(a, b, out, |_, a, b| a / b),
            BinaryOp::Max => zip(a, b, out, |_, a, b| a.greater_of(b)),
            BinaryOp::Min => zip(a, b, out, |_, a, b| a.lesser_of(b)),
            BinaryOp::Greater => zip(a, b, out, |_, a, b| T::truth(a > b)),
            BinaryOp::GreaterEqual => zip(a, b, out, |_, a, b| T::truth(a >= b)),
            BinaryOp::Equal => zip(a, b, out, |_, a, b| T::truth(a == b)),
        }
    }
}

struct Unary<'a, T> {
    op: UnaryOp,
    a: &'a [T],
    out: &'a mut [T],
}

#[inline(always)]
fn map<T: Real>(a: &[T], out: &mut [T], f: impl Fn(T) -> T) {
    for (value, &a) in out.iter_mut().zip(a) {
        *value = f(a);
    }
}

#[inline(always)]
fn sign<T: Real>(value: T) -> T {
    let signed = T::truth(value > T::ZERO) - T::truth(value < T::ZERO);
    if value.is_nan() { T::NAN } else { signed }
}

impl<T: Real> Kernel for Unary<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { op, a, out } = self;
        match op {
            UnaryOp::Neg => map(a, out, |a| -a),
            UnaryOp::Abs => map(a, out, T::abs),
            UnaryOp::Sign => map(a, out, sign),
            UnaryOp::Sqrt => map(a, out, T::sqrt),
            UnaryOp::Exp => map(a, out, T::exp),
            UnaryOp::Ln => map(a, out, T::ln),
        }
    }
}

struct Select<'a, T> {
    mask: &'a [T],
    yes: Operand<'a, T>,
    no: Operand<'a, T>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Select<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mask = &self.mask[..self.out.len()];
        zip(
            self.yes,
            self.no,
            self.out,
            |index, yes, no| {
                if mask[index] == T::ZERO { no } else { yes }
            },
        );
    }
}

/// `out[i] = a[i] op b[i]`.
///
/// # Panics
///
/// If a slice is not as long as `out`.
pub fn binary<T: Real>(
    level: Level,
    op: BinaryOp,
    a: Operand<'_, T>,
    b: Operand<'_, T>,
    out: &mut [T],
) {
    a.check("the left operand", out.len());
    b.check("the right operand", out.len());
    level.run(Binary { op, a, b, out });
}

/// `out[i] = op a[i]`.
///
/// # Panics
///
/// If `a` is not as long as `out`.
pub fn unary<T: Real>(level: Level, op: UnaryOp, a: &[T], out: &mut [T]) {
    assert_eq!(a.len(), out.len(), "the operand and the output must have the same length");
    level.run(Unary { op, a, out });
}

/// `out[i] = yes[i]` where `mask[i]` is not zero (NaN is not), else `no[i]`. Bits are kept.
///
/// # Panics
///
/// If a slice is not as long as `out`.
pub fn select<T: Real>(
    level: Level,
    mask: &[T],
    yes: Operand<'_, T>,
    no: Operand<'_, T>,
    out: &mut [T],
) {
    assert_eq!(mask.len(), out.len(), "the mask and the output must have the same length");
    yes.check("the first choice", out.len());
    no.check("the second choice", out.len());
    level.run(Select { mask, yes, no, out });
}
