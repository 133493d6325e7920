//! The meaning of an expression: the whole tensor at once, one element at a time, no tricks.
//!
//! This is what [`machine`](super::machine), [`stage`](super::stage) and the engine must agree
//! with, bit for bit. It knows neither blocks nor passes: a reduction is computed when it is met,
//! a selection sorts.

use std::collections::BTreeMap;

use super::machine::{COLUMN_BLOCK, TensorFrame};
use super::{
    Among, Pick, Ranking, Reduction, ReductionKind, Scalar, ScalarNode, Scope, Selection, Value,
    ValueNode,
};
use crate::kernels::{BLOCK, LANES, MaskKey, Real, oracle};

/// A tensor's inputs, widened, and what its masks are drawn from.
#[derive(Debug)]
pub struct Oracle<T> {
    inputs: Vec<Vec<T>>,
    frame: TensorFrame,
}

impl<T: Real> Oracle<T> {
    /// A tensor of `shape` called `name`, with these inputs.
    pub fn new(name: &str, seed: u64, shape: &[u64], inputs: Vec<Vec<T>>) -> Self {
        Self { inputs, frame: TensorFrame::new(name, seed, shape) }
    }

    /// Every element of `value`.
    pub fn evaluate(&self, value: &Value) -> Vec<T> {
        let map = |values: Vec<T>, f: &dyn Fn(T) -> T| values.into_iter().map(f).collect();
        match &*value.0 {
            ValueNode::Input(index) => self.inputs[*index].clone(),
            ValueNode::Scalar(scalar) => map(self.spread(scalar), &|x| x),
            ValueNode::Unary(op, a) => map(self.evaluate(a), &|a| oracle::unary(*op, a)),
            ValueNode::Binary(op, a, b) => {
                let (a, b) = (self.evaluate(a), self.evaluate(b));
                a.into_iter().zip(b).map(|(a, b)| oracle::binary(*op, a, b)).collect()
            }
            ValueNode::Select { mask, yes, no } => {
                let (yes, no) = (self.evaluate(yes), self.evaluate(no));
                let choices = self.evaluate(mask).into_iter().zip(yes.into_iter().zip(no));
                choices.map(|(mask, (yes, no))| oracle::select(mask, yes, no)).collect()
            }
            ValueNode::WeightedSum(terms) => self.weighted_sum(terms),
            ValueNode::Elect { terms, average } => {
                let terms: Vec<(T, Vec<T>)> =
                    terms.iter().map(|(w, v)| (T::from_f64(*w), self.evaluate(v))).collect();
                let element = |at: usize| {
                    let terms: Vec<(T, T)> = terms.iter().map(|(w, v)| (*w, v[at])).collect();
                    oracle::elect(&terms, *average)
                };
                (0..self.frame.elements as usize).map(element).collect()
            }
            ValueNode::Keep(selection) => self.kept(selection),
            ValueNode::Kept { .. } => unreachable!("only the engine binds selections"),
            ValueNode::Random { keep_below, stream } => self.random(*keep_below, *stream),
            ValueNode::ByRank(ranking) => self.picked(ranking),
            ValueNode::Marked(_) => unreachable!("only the engine binds rankings"),
        }
    }

    /// A scalar, for each element.
    fn spread(&self, scalar: &Scalar) -> Vec<T> {
        self.scalar(scalar).into_iter().map(T::from_f64).collect()
    }

    /// A scalar in f64, for each element.
    fn scalar(&self, scalar: &Scalar) -> Vec<f64> {
        let elements = self.frame.elements as usize;
        match &*scalar.0 {
            ScalarNode::Constant(value) => vec![*value; elements],
            ScalarNode::Vector { .. } => unreachable!("only the engine binds vectors"),
            ScalarNode::Reduction(reduction) => self.reduce(reduction),
            ScalarNode::Threshold(selection) => vec![self.threshold(selection); elements],
            ScalarNode::Computed { of, index } => {
                let arguments: Vec<_> = of.arguments.iter().map(|a| self.scalar(a)).collect();
                let at = |element: usize| arguments.iter().map(|a| a[element]).collect::<Vec<_>>();
                (0..elements).map(|element| of.run(&at(element))[*index]).collect()
            }
        }
    }

    /// Coefficients of zero skip their term, and a lone one is the term, if they are the same for
    /// the whole tensor.
    fn weighted_sum(&self, terms: &[(Scalar, Value)]) -> Vec<T> {
        let mut kept: Vec<(Vec<f64>, Vec<T>)> = Vec::new();
        let mut varies = false;
        for (coefficient, value) in terms {
            let coefficients = self.scalar(coefficient);
            let whole = coefficient.scope().is_none_or(|scope| scope <= Scope::Tensor);
            varies |= !whole;
            if !(whole && coefficients.iter().all(|&c| c == 0.0)) {
                kept.push((coefficients, self.evaluate(value)));
            }
        }
        if let [(coefficients, values)] = kept.as_slice()
            && !varies
            && coefficients.iter().all(|&c| c == 1.0)
        {
            return values.clone();
        }
        let element = |at: usize| {
            let terms: Vec<(T, T)> =
                kept.iter().map(|(c, values)| (T::from_f64(c[at]), values[at])).collect();
            if terms.is_empty() { T::ZERO } else { oracle::weighted_sum(&terms) }
        };
        (0..self.frame.elements as usize).map(element).collect()
    }

    fn random(&self, keep_below: u64, stream: u32) -> Vec<T> {
        let key = MaskKey::new(self.frame.seed, &self.frame.name, stream);
        let keeps = |index: u64| u64::from(oracle::draw(&key, index)) < keep_below;
        (0..self.frame.elements).map(|index| T::truth(keeps(index))).collect()
    }

    /// Indices of the elements, largest first; of equal ones the lowest index first.
    fn ranking(&self, selection: &Selection) -> (Vec<T>, Vec<usize>) {
        let values = self.evaluate(&selection.value);
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(oracle::key(values[index])));
        (values, order)
    }

    /// The vectors whose elements are ranked among each other, each in the order of its elements.
    fn vectors(&self, among: Among) -> Vec<Vec<usize>> {
        let row = self.frame.row;
        // The row or slab that an element lies in, and what tells vectors apart there.
        let name = |index: u64| match among {
            Among::Row => (index / row, 0),
            Among::Group(size) => (index / row, index % row / size),
            Among::Vector { length, stride } => (index / (length * stride), index % stride),
        };
        let mut vectors = BTreeMap::<_, Vec<usize>>::new();
        for index in 0..self.frame.elements {
            vectors.entry(name(index)).or_default().push(index as usize);
        }
        vectors.into_values().collect()
    }

    fn picked(&self, ranking: &Ranking) -> Vec<T> {
        let values = self.evaluate(&ranking.value);
        let mut picked = vec![T::ZERO; values.len()];
        for mut vector in self.vectors(ranking.among) {
            // Of equal ones the first stays first, and so is the largest.
            vector.sort_by_key(|&index| std::cmp::Reverse(oracle::key(values[index])));
            let last = vector.len() as u64 - 1;
            for (place, &index) in (0..).zip(&vector) {
                let is_picked = match ranking.pick {
                    Pick::Largest(count) => place < count,
                    Pick::Random { lowest, highest, stream } => {
                        let key = MaskKey::new(self.frame.seed, &self.frame.name, stream);
                        let draw = f64::from(oracle::draw(&key, index as u64));
                        draw < oracle::bound_of_rank(last - place, last, lowest, highest)
                    }
                };
                picked[index] = T::truth(is_picked);
            }
        }
        picked
    }

    fn count(&self, selection: &Selection) -> usize {
        self.scalar(&selection.count).first().map_or(0, |&count| count.max(0.0) as usize)
    }

    fn kept(&self, selection: &Selection) -> Vec<T> {
        let (values, order) = self.ranking(selection);
        let mut kept = vec![T::ZERO; values.len()];
        for &index in order.iter().take(self.count(selection)) {
            kept[index] = T::ONE;
        }
        kept
    }

    fn threshold(&self, selection: &Selection) -> f64 {
        let (values, order) = self.ranking(selection);
        // The smallest of none is no number.
        let Some(last) = self.count(selection).min(values.len()).checked_sub(1) else {
            return f64::NAN;
        };
        // Both zeros rank alike; the positive one stands for them.
        values[order[last]].to_f64() + 0.0
    }

    /// The reduction that each element's scope has.
    fn reduce(&self, reduction: &Reduction) -> Vec<f64> {
        let left = self.evaluate(&reduction.left);
        let right = reduction.right.as_ref().map(|right| self.evaluate(right));
        let term = |at: usize| match (&right, reduction.kind) {
            (Some(right), ReductionKind::Differing) => {
                f64::from(left[at].to_f64().to_bits() != right[at].to_f64().to_bits())
            }
            (Some(right), _) => left[at].to_f64() * right[at].to_f64(),
            (None, ReductionKind::AbsoluteSum) => left[at].to_f64().abs(),
            (None, _) => left[at].to_f64(),
        };
        let (row, line) = (self.frame.row as usize, self.frame.line as usize);
        let all = 0..left.len();
        let over = |indices: Vec<usize>, block: usize, lanes: usize| {
            let terms: Vec<f64> = indices.into_iter().map(term).collect();
            reduce_terms(reduction.kind, &terms, block, lanes)
        };
        match reduction.scope {
            Scope::Model | Scope::Tensor => {
                vec![over(all.clone().collect(), BLOCK, LANES); left.len()]
            }
            Scope::Row => {
                let starts = all.clone().step_by(row);
                let rows: Vec<f64> = starts
                    .map(|start| over((start..start + row).collect(), BLOCK, LANES))
                    .collect();
                all.map(|at| rows[at / row]).collect()
            }
            Scope::Column => {
                let column = |c: usize| (c..left.len()).step_by(line).collect::<Vec<_>>();
                let columns: Vec<f64> =
                    (0..line).map(|c| over(column(c), COLUMN_BLOCK as usize, 1)).collect();
                all.map(|at| columns[at % line]).collect()
            }
        }
    }
}

/// Blocks of terms, in each block lanes by index, both folded in halves.
fn reduce_terms(kind: ReductionKind, terms: &[f64], block: usize, lanes: usize) -> f64 {
    if kind == ReductionKind::Max {
        if terms.iter().any(|term| term.is_nan()) {
            return f64::NAN;
        }
        let larger = |a: f64, b: f64| if a > b { a } else { b };
        // The positive zero stands for both.
        return terms.iter().copied().fold(f64::NEG_INFINITY, larger) + 0.0;
    }
    let block_sum = |terms: &[f64]| {
        let mut sums = vec![0.0; lanes];
        for (at, term) in terms.iter().enumerate() {
            sums[at % lanes] += term;
        }
        oracle::fold_halves(&sums)
    };
    oracle::fold_halves(&terms.chunks(block).map(block_sum).collect::<Vec<_>>())
}
