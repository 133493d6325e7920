//! A merge method, written as a formula.
//!
//! A method says what an output element is, in terms of the input elements and of numbers that
//! summarise a whole tensor (or row, or column, or model). It says so once, as an expression:
//!
//! ```
//! use oxmerge::formula::{Value, Scope, compute};
//! // a · cos + b · sin, with an angle that depends on the whole tensor
//! let (a, b) = (Value::input(0), Value::input(1));
//! let norms = [a.dot(&a, Scope::Tensor), b.dot(&b, Scope::Tensor)];
//! let weights = compute(&norms, 2, |n| vec![n[0] / (n[0] + n[1]), n[1] / (n[0] + n[1])]);
//! let output = Value::weighted_sum([(weights[0].clone(), a), (weights[1].clone(), b)]);
//! # let _ = output;
//! ```
//!
//! The expression is data. The engine finds in it which reductions are needed and in which order
//! ([`stage`]), binds their results ([`bind`]), compiles each pass ([`compile`](mod@compile)) to a
//! short list of vector instructions and effects ([`program`]), of which some become one ([`fuse`]),
//! and runs those over cache-sized chunks ([`machine`]). So a method does not know about blocks, threads, files or
//! devices, and another backend walks the same programs.
//!
//! Three rules give the numbers their meaning (`kernels/NUMERICS.md` has the rest):
//!
//! 1. A [`Value`] is computed in the working type, one rounding an operation, in written order.
//! 2. A [`Scalar`] is an f64. Where it meets values it is rounded once to the working type.
//! 3. In a weighted sum a coefficient of zero skips its term, and a lone coefficient of exactly
//!    one is the term itself. Both hold for coefficients that are known only after a reduction.

pub mod bind;
pub(crate) mod compile;
mod fuse;
pub mod listing;
pub mod machine;
pub(crate) mod masks;
pub mod oracle;
pub(crate) mod program;
pub mod selection;
pub mod stage;
mod unify;

use std::fmt;
use std::ops;
use std::sync::Arc;

pub use crate::kernels::{BinaryOp, UnaryOp};

/// What a reduction runs over, and so what a [`Scalar`] may differ by. Ordered from wide to narrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All tensors of the merge: needs a sweep over the model before the merge.
    Model,
    /// The whole tensor.
    Tensor,
    /// Vectors along the last dimension; a tensor of one dimension is one row.
    Row,
    /// Vectors along the first dimension.
    Column,
}

/// How a reduction summarises its values. All are f64 with the fixed shape of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReductionKind {
    /// The sum of the values.
    Sum,
    /// The sum of the magnitudes.
    AbsoluteSum,
    /// The sum of products of two values, multiplied in f64.
    Dot,
    /// The largest value.
    Max,
    /// How many elements of two inputs of one type, whatever it is, differ in any bit as they are
    /// stored.
    Differing,
}

/// One number for each element of the tensor.
#[derive(Clone)]
pub struct Value(pub(crate) Arc<ValueNode>);

/// One number for a scope.
#[derive(Clone)]
pub struct Scalar(pub(crate) Arc<ScalarNode>);

pub(crate) enum ValueNode {
    Input(usize),
    Scalar(Scalar),
    Unary(UnaryOp, Value),
    Binary(BinaryOp, Value, Value),
    Select {
        mask: Value,
        yes: Value,
        no: Value,
    },
    WeightedSum(Vec<(Scalar, Value)>),
    /// The terms of the sign that their sum has, summed; with `average`, by their weights.
    Elect {
        terms: Vec<(f64, Value)>,
        average: bool,
    },
    /// 1 where the element is among the kept, else 0.
    Keep(Arc<Selection>),
    /// The same, after the selection was found: `which` of those of the task it is.
    Kept {
        value: Value,
        which: usize,
    },
    /// 1 where a draw of 32 bits is below the bound, else 0; independent for each stream and element.
    Random {
        keep_below: u64,
        stream: u32,
    },
    /// 1 where the element is kept for its rank among others, else 0.
    ByRank(Arc<Ranking>),
    /// The same, after they were ranked: which of the rankings of the task it is.
    Marked(usize),
}

pub(crate) enum ScalarNode {
    Constant(f64),
    Reduction(Arc<Reduction>),
    /// The smallest of the kept values.
    Threshold(Arc<Selection>),
    Computed {
        of: Arc<Computation>,
        index: usize,
    },
    /// The results of a row or column reduction: entry i is for row (column) `first` + i.
    Vector {
        axis: Scope,
        first: u64,
        values: Arc<Vec<f64>>,
    },
}

/// A summary of values over a scope.
pub(crate) struct Reduction {
    pub(crate) kind: ReductionKind,
    pub(crate) left: Value,
    /// The second factor of a dot product.
    pub(crate) right: Option<Value>,
    pub(crate) scope: Scope,
}

/// The `count` largest values of a tensor; of equal values the lowest flat indices.
pub(crate) struct Selection {
    pub(crate) value: Value,
    pub(crate) count: Scalar,
}

/// A found [`Selection`]: keep keys above `threshold`, and equal ones before index `equals_end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Order key of the smallest kept value.
    pub threshold: u64,
    /// Flat index just past the last kept element whose key equals the threshold.
    pub equals_end: u64,
}

/// Elements that are ranked among each other, and which of them are kept.
#[derive(Debug)]
pub(crate) struct Ranking {
    pub(crate) value: Value,
    pub(crate) among: Among,
    pub(crate) pick: Pick,
}

/// Among which elements an element is ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// Its row.
    Row,
    /// Each so many elements of a row, counted from its first; the last of a row may be fewer.
    Group(u64),
    /// `length` elements that lie `stride` apart: the vectors along any dimension.
    Vector {
        /// Elements of a vector.
        length: u64,
        /// From one of its elements to the next; as many vectors lie interleaved.
        stride: u64,
    },
}

/// What is kept of elements that are ranked. Of equal ones, that of the lowest index is the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pick {
    /// The largest: so many, or all if there are fewer.
    Largest(u64),
    /// Each with a probability that rises evenly from the smallest to the largest. One that is alone
    /// has the mean of both.
    Random {
        /// The probability of the smallest.
        lowest: f64,
        /// The probability of the largest.
        highest: f64,
        /// Which of the independent random masks of a tensor.
        stream: u32,
    },
}

/// Which random mask: its stream, and the bound of its draw.
pub(crate) type MaskName = (u32, u64);

type HostFunction = dyn Fn(&[f64]) -> Vec<f64> + Send + Sync;

/// A function of scalars with several results, run on the host.
pub(crate) struct Computation {
    pub(crate) arguments: Vec<Scalar>,
    pub(crate) results: usize,
    pub(crate) function: Arc<HostFunction>,
}

impl Scalar {
    /// A number known when the plan is made.
    pub fn constant(value: f64) -> Self {
        Self(Arc::new(ScalarNode::Constant(value)))
    }

    /// The number, if it needs no reduction.
    pub fn as_constant(&self) -> Option<f64> {
        match &*self.0 {
            ScalarNode::Constant(value) => Some(*value),
            _ => None,
        }
    }

    /// One number for each row or column, from `first` on.
    pub(crate) fn vector(axis: Scope, first: u64, values: Vec<f64>) -> Self {
        Self(Arc::new(ScalarNode::Vector { axis, first, values: Arc::new(values) }))
    }

    /// The axis of a vector, its first entry, and its numbers.
    pub(crate) fn as_vector(&self) -> Option<(Scope, u64, &[f64])> {
        match &*self.0 {
            ScalarNode::Vector { axis, first, values } => Some((*axis, *first, values)),
            _ => None,
        }
    }

    /// Whether it becomes a vector along `axis`, when what is reduced along it is known.
    pub(crate) fn is_vector_of(&self, axis: Scope) -> bool {
        match &*self.0 {
            ScalarNode::Constant(_) => true,
            ScalarNode::Vector { axis: own, .. } => *own == axis,
            ScalarNode::Reduction(reduction) => reduction.scope == axis,
            ScalarNode::Threshold(_) => false,
            ScalarNode::Computed { of, .. } => {
                of.arguments.iter().all(|argument| argument.is_vector_of(axis))
            }
        }
    }

    /// The number for entry `index` of a vector, or the constant.
    fn entry(&self, index: usize) -> f64 {
        match &*self.0 {
            ScalarNode::Constant(value) => *value,
            ScalarNode::Vector { values, .. } => values[index],
            _ => unreachable!("an argument of a computation is not known yet"),
        }
    }

    /// The narrowest scope it depends on; `None` for a constant.
    pub fn scope(&self) -> Option<Scope> {
        match &*self.0 {
            ScalarNode::Constant(_) => None,
            ScalarNode::Reduction(reduction) => Some(reduction.scope),
            ScalarNode::Threshold(_) => Some(Scope::Tensor),
            ScalarNode::Computed { of, .. } => of.arguments.iter().filter_map(Self::scope).max(),
            ScalarNode::Vector { axis, .. } => Some(*axis),
        }
    }
}

/// `function` of some scalars, giving `results` scalars. Runs once a scope, in f64, on the host.
///
/// A function of constants is run at once.
pub fn compute(
    arguments: &[Scalar],
    results: usize,
    function: impl Fn(&[f64]) -> Vec<f64> + Send + Sync + 'static,
) -> Vec<Scalar> {
    let of = Computation { arguments: arguments.to_vec(), results, function: Arc::new(function) };
    of.simplified()
}

impl Computation {
    /// Its results: constants if the arguments are, else references to it.
    pub(crate) fn simplified(self) -> Vec<Scalar> {
        let known: Option<Vec<f64>> = self.arguments.iter().map(Scalar::as_constant).collect();
        if let Some(known) = known {
            return self.run(&known).into_iter().map(Scalar::constant).collect();
        }
        if let Some(vectors) = self.over_vectors() {
            return vectors;
        }
        let of = Arc::new(self);
        (0..of.results)
            .map(|index| Scalar(Arc::new(ScalarNode::Computed { of: Arc::clone(&of), index })))
            .collect()
    }

    /// Its results entry by entry, if every argument is a constant or a vector.
    fn over_vectors(&self) -> Option<Vec<Scalar>> {
        let known = |argument: &Scalar| {
            matches!(&*argument.0, ScalarNode::Constant(_) | ScalarNode::Vector { .. })
        };
        if !self.arguments.iter().all(known) {
            return None;
        }
        let mut vectors = self.arguments.iter().filter_map(|argument| match &*argument.0 {
            ScalarNode::Vector { axis, first, values } => Some((*axis, *first, values.len())),
            _ => None,
        });
        let (axis, first, length) = vectors.next()?;
        if vectors.any(|other| other != (axis, first, length)) {
            // Of rows and of columns: there is no such vector.
            return None;
        }
        let mut results = vec![Vec::with_capacity(length); self.results];
        for entry in 0..length {
            let arguments: Vec<f64> =
                self.arguments.iter().map(|argument| argument.entry(entry)).collect();
            for (result, value) in results.iter_mut().zip(self.run(&arguments)) {
                result.push(value);
            }
        }
        let vector = |values| Scalar::vector(axis, first, values);
        Some(results.into_iter().map(vector).collect())
    }

    pub(crate) fn run(&self, arguments: &[f64]) -> Vec<f64> {
        let results = (self.function)(arguments);
        assert_eq!(results.len(), self.results, "a computation gave another number of results");
        results
    }
}

impl From<f64> for Scalar {
    fn from(value: f64) -> Self {
        Self::constant(value)
    }
}

impl Value {
    pub(crate) fn new(node: ValueNode) -> Self {
        Self(Arc::new(node))
    }

    /// The elements of input `index`, in listed order, widened to the working type.
    pub fn input(index: usize) -> Self {
        Self::new(ValueNode::Input(index))
    }

    /// The same number for every element (of the scalar's scope).
    pub fn scalar(scalar: impl Into<Scalar>) -> Self {
        Self::new(ValueNode::Scalar(scalar.into()))
    }

    /// Σ coefficient · value: separate multiply and add, in the given order.
    pub fn weighted_sum<S: Into<Scalar>>(terms: impl IntoIterator<Item = (S, Self)>) -> Self {
        simplify_weighted_sum(terms.into_iter().map(|(c, v)| (c.into(), v)).collect())
    }

    /// `coefficient · self`, with the skipping rules of a weighted sum.
    pub fn scaled(&self, coefficient: impl Into<Scalar>) -> Self {
        Self::weighted_sum([(coefficient.into(), self.clone())])
    }

    /// A function of one value.
    pub fn unary(&self, op: UnaryOp) -> Self {
        Self::new(ValueNode::Unary(op, self.clone()))
    }

    /// A function of two values; comparisons give 1 or 0.
    pub fn binary(&self, op: BinaryOp, other: &Self) -> Self {
        Self::new(ValueNode::Binary(op, self.clone(), other.clone()))
    }

    /// The magnitude.
    pub fn abs(&self) -> Self {
        self.unary(UnaryOp::Abs)
    }

    /// −1, 0 or 1.
    pub fn sign(&self) -> Self {
        self.unary(UnaryOp::Sign)
    }

    /// `yes` where `self` is not 0, else `no`.
    pub fn select(&self, yes: &Self, no: &Self) -> Self {
        Self::new(ValueNode::Select { mask: self.clone(), yes: yes.clone(), no: no.clone() })
    }

    /// 1 where `self` ≥ `other`, else 0.
    pub fn at_least(&self, other: &Self) -> Self {
        self.binary(BinaryOp::GreaterEqual, other)
    }

    /// `self` where `mask` is not 0, else 0.
    pub fn masked(&self, mask: &Self) -> Self {
        mask.select(self, &Self::scalar(0.0))
    }

    /// The sign vote of TIES: the sum of those `weight · value` that have the sign of the sum of them
    /// all, zero counting as positive; with `average`, divided by the sum of their weights.
    pub fn elect(terms: impl IntoIterator<Item = (f64, Self)>, average: bool) -> Self {
        let terms: Vec<_> = terms.into_iter().filter(|(weight, _)| *weight != 0.0).collect();
        if terms.is_empty() {
            return Self::scalar(0.0);
        }
        Self::new(ValueNode::Elect { terms, average })
    }

    /// 1 with probability `density`, else 0. Streams are independent of each other.
    pub fn random_mask(density: f64, stream: u32) -> Self {
        let keep_below = (density * 4_294_967_296.0).round() as u64;
        Self::new(ValueNode::Random { keep_below, stream })
    }

    /// 1 for the `count` largest values of the tensor, else 0.
    ///
    /// Of equal values the lowest flat indices are kept. Exact, without sorting.
    pub fn largest(&self, count: impl Into<Scalar>) -> Self {
        Self::new(ValueNode::Keep(self.selection(count)))
    }

    /// The value of rank `count`, counted from the largest (1 is the maximum).
    pub fn order_statistic(&self, count: impl Into<Scalar>) -> Scalar {
        Scalar(Arc::new(ScalarNode::Threshold(self.selection(count))))
    }

    /// 1 for the elements that are kept for their rank among others, else 0. Exact.
    pub fn picked_by_rank(&self, among: Among, pick: Pick) -> Self {
        let value = self.clone();
        Self::new(ValueNode::ByRank(Arc::new(Ranking { value, among, pick })))
    }

    fn selection(&self, count: impl Into<Scalar>) -> Arc<Selection> {
        Arc::new(Selection { value: self.clone(), count: count.into() })
    }

    fn reduce(&self, kind: ReductionKind, right: Option<&Self>, scope: Scope) -> Scalar {
        let (left, right) = (self.clone(), right.cloned());
        Scalar(Arc::new(ScalarNode::Reduction(Arc::new(Reduction { kind, left, right, scope }))))
    }

    /// The sum over the scope.
    pub fn sum(&self, scope: Scope) -> Scalar {
        self.reduce(ReductionKind::Sum, None, scope)
    }

    /// The sum of magnitudes over the scope.
    pub fn absolute_sum(&self, scope: Scope) -> Scalar {
        self.reduce(ReductionKind::AbsoluteSum, None, scope)
    }

    /// The inner product over the scope.
    pub fn dot(&self, other: &Self, scope: Scope) -> Scalar {
        self.reduce(ReductionKind::Dot, Some(other), scope)
    }

    /// How many elements of two inputs, which must be of one type, are stored as other bits.
    pub fn differing(a: usize, b: usize) -> Scalar {
        let other = Self::input(b);
        Self::input(a).reduce(ReductionKind::Differing, Some(&other), Scope::Tensor)
    }

    /// The largest value over the scope.
    pub fn max(&self, scope: Scope) -> Scalar {
        self.reduce(ReductionKind::Max, None, scope)
    }
}

/// Rule 3: zero coefficients drop their term; a lone one is the term itself.
pub(crate) fn simplify_weighted_sum(mut terms: Vec<(Scalar, Value)>) -> Value {
    terms.retain(|(coefficient, _)| coefficient.as_constant() != Some(0.0));
    match terms.as_slice() {
        [] => Value::scalar(0.0),
        [(coefficient, value)] if coefficient.as_constant() == Some(1.0) => value.clone(),
        _ => Value::new(ValueNode::WeightedSum(terms)),
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $op:ident) => {
        impl ops::$trait for Value {
            type Output = Self;
            fn $method(self, other: Self) -> Self {
                self.binary(BinaryOp::$op, &other)
            }
        }
        impl ops::$trait for &Value {
            type Output = Value;
            fn $method(self, other: Self) -> Value {
                self.binary(BinaryOp::$op, other)
            }
        }
    };
}
operator!(Add, add, Add);
operator!(Sub, sub, Sub);
operator!(Mul, mul, Mul);
operator!(Div, div, Div);

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            ValueNode::Input(index) => write!(f, "x{index}"),
            ValueNode::Scalar(scalar) => write!(f, "{scalar:?}"),
            ValueNode::Unary(op, a) => write!(f, "{op:?}({a:?})"),
            ValueNode::Binary(op, a, b) => write!(f, "{op:?}({a:?}, {b:?})"),
            ValueNode::Select { mask, yes, no } => write!(f, "Select({mask:?}, {yes:?}, {no:?})"),
            ValueNode::WeightedSum(terms) => f.debug_map().entries(terms.iter().cloned()).finish(),
            ValueNode::Elect { terms, average } => write!(f, "Elect({terms:?}, {average})"),
            ValueNode::Keep(selection) => {
                write!(f, "Largest({:?} of {:?})", selection.count, selection.value)
            }
            ValueNode::Kept { value, which } => write!(f, "Kept({value:?}, {which})"),
            ValueNode::Random { keep_below, stream } => {
                write!(f, "Random({keep_below}, {stream})")
            }
            ValueNode::ByRank(ranking) => {
                let Ranking { value, among, pick } = &**ranking;
                write!(f, "{pick:?} in {among:?} of {value:?}")
            }
            ValueNode::Marked(which) => write!(f, "Marked({which})"),
        }
    }
}

impl fmt::Debug for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, left, right, scope } = self;
        match right {
            None => write!(f, "{kind:?}[{scope:?}]({left:?})"),
            Some(right) => write!(f, "{kind:?}[{scope:?}]({left:?}, {right:?})"),
        }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            ScalarNode::Constant(value) => write!(f, "{value}"),
            ScalarNode::Reduction(reduction) => write!(f, "{reduction:?}"),
            ScalarNode::Threshold(selection) => {
                write!(f, "Threshold({:?} of {:?})", selection.count, selection.value)
            }
            ScalarNode::Computed { of, index } => write!(f, "f{index}({:?})", of.arguments),
            ScalarNode::Vector { axis, values, .. } => write!(f, "{axis:?}[{}]", values.len()),
        }
    }
}
