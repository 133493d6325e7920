//! Makes equal parts of expressions one part.
//!
//! What is computed once is what is one node. A method may write the same task vector twice, and the
//! formulas of a sweep are written apart: their statistics are equal, not the same. So each node that
//! is rebuilt is looked up by its kind, its numbers, and the addresses of its parts, which were
//! looked up before; the first of its kind stands for all.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Among, Pick, Ranking, Reduction, Scalar, ScalarNode, Selection, Value, ValueNode};

/// What makes two nodes equal.
type Key = Vec<u64>;

/// The first node of each kind. Keeps them alive, so that an address means one node.
#[derive(Default)]
pub(super) struct Unified {
    values: HashMap<Key, Value>,
    scalars: HashMap<Key, Scalar>,
    reductions: HashMap<Key, Arc<Reduction>>,
    selections: HashMap<Key, Arc<Selection>>,
    rankings: HashMap<Key, Arc<Ranking>>,
}

impl Unified {
    pub(super) fn value(&mut self, value: Value) -> Value {
        self.values.entry(value_key(&value.0)).or_insert(value).clone()
    }

    pub(super) fn scalar(&mut self, scalar: Scalar) -> Scalar {
        self.scalars.entry(scalar_key(&scalar)).or_insert(scalar).clone()
    }

    pub(super) fn reduction(&mut self, reduction: Reduction) -> Arc<Reduction> {
        let Reduction { kind, left, right, scope } = &reduction;
        let right = right.as_ref().map_or(0, address_of);
        let key = vec![*kind as u64, *scope as u64, address_of(left), right];
        Arc::clone(self.reductions.entry(key).or_insert_with(|| Arc::new(reduction)))
    }

    pub(super) fn selection(&mut self, selection: Selection) -> Arc<Selection> {
        let mut key = vec![address_of(&selection.value)];
        key.extend(scalar_key(&selection.count));
        Arc::clone(self.selections.entry(key).or_insert_with(|| Arc::new(selection)))
    }

    pub(super) fn ranking(&mut self, ranking: Ranking) -> Arc<Ranking> {
        let among = match ranking.among {
            Among::Row => [0, 0, 0],
            Among::Group(elements) => [1, elements, 0],
            Among::Vector { length, stride } => [2, length, stride],
        };
        let pick = match ranking.pick {
            Pick::Largest(count) => vec![count],
            Pick::Random { lowest, highest, stream } => {
                vec![lowest.to_bits(), highest.to_bits(), u64::from(stream)]
            }
        };
        let key = [vec![address_of(&ranking.value)], among.to_vec(), pick].concat();
        Arc::clone(self.rankings.entry(key).or_insert_with(|| Arc::new(ranking)))
    }
}

fn address<T>(part: &Arc<T>) -> u64 {
    Arc::as_ptr(part).addr() as u64
}

fn address_of(value: &Value) -> u64 {
    address(&value.0)
}

fn value_key(node: &ValueNode) -> Key {
    match node {
        ValueNode::Input(index) => vec![0, *index as u64],
        ValueNode::Scalar(scalar) => [vec![1], scalar_key(scalar)].concat(),
        ValueNode::Unary(op, a) => vec![2, *op as u64, address_of(a)],
        ValueNode::Binary(op, a, b) => vec![3, *op as u64, address_of(a), address_of(b)],
        ValueNode::Select { mask, yes, no } => {
            vec![4, address_of(mask), address_of(yes), address_of(no)]
        }
        ValueNode::WeightedSum(terms) => {
            let term = |(c, value): &(Scalar, Value)| [scalar_key(c), vec![address_of(value)]];
            [vec![5], terms.iter().flat_map(term).flatten().collect()].concat()
        }
        ValueNode::Elect { terms, average } => {
            let term = |(weight, value): &(f64, Value)| [weight.to_bits(), address_of(value)];
            [vec![6, u64::from(*average)], terms.iter().flat_map(term).collect()].concat()
        }
        ValueNode::Keep(selection) => vec![7, address(selection)],
        ValueNode::Kept { value, which } => vec![8, address_of(value), *which as u64],
        ValueNode::Random { keep_below, stream } => vec![9, *keep_below, u64::from(*stream)],
        ValueNode::ByRank(ranking) => vec![10, address(ranking)],
        ValueNode::Marked(which) => vec![11, *which as u64],
    }
}

/// Two words, whatever it is.
fn scalar_key(scalar: &Scalar) -> Key {
    match &*scalar.0 {
        // No address ends in a one.
        ScalarNode::Constant(value) => vec![1, value.to_bits()],
        ScalarNode::Reduction(reduction) => vec![address(reduction), 0],
        ScalarNode::Threshold(selection) => vec![address(selection), 1],
        ScalarNode::Computed { of, index } => vec![address(of), *index as u64],
        ScalarNode::Vector { values, .. } => vec![address(values), 0],
    }
}
