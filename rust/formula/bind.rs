//! Replaces reductions and selections by their results.
//!
//! Binding rebuilds the expression bottom-up, so the rules of the constructors act again: a
//! computation whose arguments became known runs, a coefficient that became zero drops its term
//! (and with it, maybe, the last use of an input), a lone coefficient of one leaves a plain copy.
//! Shared nodes stay shared, since everything is remembered by address, and equal ones become shared
//! ([`unify`](super::unify)).

use std::collections::HashMap;
use std::sync::Arc;

use super::unify::Unified;
use super::{
    Computation, Ranking, Reduction, Scalar, ScalarNode, Selection, Value, ValueNode,
    simplify_weighted_sum,
};

/// Known results, by the address of what they are results of.
#[derive(Debug, Default)]
pub struct Bindings {
    reductions: HashMap<*const Reduction, Scalar>,
    selections: HashMap<*const Selection, (usize, f64)>,
    rankings: HashMap<*const Ranking, usize>,
}

impl Bindings {
    pub(crate) fn reduction(&mut self, reduction: &Arc<Reduction>, result: Scalar) {
        self.reductions.insert(Arc::as_ptr(reduction), result);
    }

    /// `which` of those of the task it is, and the smallest value that it keeps.
    pub(crate) fn selection(&mut self, selection: &Arc<Selection>, which: usize, value: f64) {
        self.selections.insert(Arc::as_ptr(selection), (which, value));
    }

    /// `which` of those of the task, or of a step of it, it is.
    pub(crate) fn ranking(&mut self, ranking: &Arc<Ranking>, which: usize) {
        self.rankings.insert(Arc::as_ptr(ranking), which);
    }

    /// Several values with everything known put in; what they share stays shared.
    pub fn bind_all(&self, values: &[Value]) -> Vec<Value> {
        let mut binder = Binder::new(self);
        values.iter().map(|value| binder.value(value)).collect()
    }

    /// The same of scalars.
    pub(crate) fn bind_scalars(&self, scalars: &[Scalar]) -> Vec<Scalar> {
        let mut binder = Binder::new(self);
        scalars.iter().map(|scalar| binder.scalar(scalar)).collect()
    }
}

struct Binder<'a> {
    known: &'a Bindings,
    unified: Unified,
    values: HashMap<*const ValueNode, Value>,
    scalars: HashMap<*const ScalarNode, Scalar>,
    reductions: HashMap<*const Reduction, Arc<Reduction>>,
    selections: HashMap<*const Selection, Arc<Selection>>,
    rankings: HashMap<*const Ranking, Arc<Ranking>>,
    computations: HashMap<*const Computation, Vec<Scalar>>,
}

impl<'a> Binder<'a> {
    fn new(known: &'a Bindings) -> Self {
        Self {
            known,
            unified: Unified::default(),
            values: HashMap::new(),
            scalars: HashMap::new(),
            reductions: HashMap::new(),
            selections: HashMap::new(),
            rankings: HashMap::new(),
            computations: HashMap::new(),
        }
    }

    fn value(&mut self, value: &Value) -> Value {
        let key = Arc::as_ptr(&value.0);
        if let Some(done) = self.values.get(&key) {
            return done.clone();
        }
        let bound = self.rebuild(value);
        let bound = self.unified.value(bound);
        self.values.insert(key, bound.clone());
        bound
    }

    fn rebuild(&mut self, value: &Value) -> Value {
        match &*value.0 {
            ValueNode::Input(_) | ValueNode::Random { .. } | ValueNode::Marked(_) => value.clone(),
            ValueNode::Scalar(scalar) => Value::scalar(self.scalar(scalar)),
            ValueNode::Unary(op, a) => self.value(a).unary(*op),
            ValueNode::Binary(op, a, b) => {
                let a = self.value(a);
                a.binary(*op, &self.value(b))
            }
            ValueNode::Select { mask, yes, no } => {
                let (mask, yes) = (self.value(mask), self.value(yes));
                mask.select(&yes, &self.value(no))
            }
            ValueNode::WeightedSum(terms) => simplify_weighted_sum(
                terms.iter().map(|(c, v)| (self.scalar(c), self.value(v))).collect(),
            ),
            ValueNode::Elect { terms, average } => {
                let terms = terms.iter().map(|(w, v)| (*w, self.value(v))).collect();
                Value::new(ValueNode::Elect { terms, average: *average })
            }
            ValueNode::Keep(selection) => {
                match self.known.selections.get(&Arc::as_ptr(selection)) {
                    Some(&(which, _)) => {
                        Value::new(ValueNode::Kept { value: self.value(&selection.value), which })
                    }
                    None => Value::new(ValueNode::Keep(self.selection(selection))),
                }
            }
            ValueNode::Kept { value, which } => {
                Value::new(ValueNode::Kept { value: self.value(value), which: *which })
            }
            ValueNode::ByRank(ranking) => {
                Value::new(match self.known.rankings.get(&Arc::as_ptr(ranking)) {
                    Some(&which) => ValueNode::Marked(which),
                    None => ValueNode::ByRank(self.ranking(ranking)),
                })
            }
        }
    }

    fn scalar(&mut self, scalar: &Scalar) -> Scalar {
        let key = Arc::as_ptr(&scalar.0);
        if let Some(done) = self.scalars.get(&key) {
            return done.clone();
        }
        let bound = match &*scalar.0 {
            ScalarNode::Constant(_) | ScalarNode::Vector { .. } => scalar.clone(),
            ScalarNode::Reduction(reduction) => {
                match self.known.reductions.get(&Arc::as_ptr(reduction)) {
                    Some(result) => result.clone(),
                    None => Scalar(Arc::new(ScalarNode::Reduction(self.reduction(reduction)))),
                }
            }
            ScalarNode::Threshold(selection) => {
                match self.known.selections.get(&Arc::as_ptr(selection)) {
                    Some(&(_, value)) => Scalar::constant(value),
                    None => Scalar(Arc::new(ScalarNode::Threshold(self.selection(selection)))),
                }
            }
            ScalarNode::Computed { of, index } => self.computation(of)[*index].clone(),
        };
        let bound = self.unified.scalar(bound);
        self.scalars.insert(key, bound.clone());
        bound
    }

    fn computation(&mut self, of: &Arc<Computation>) -> Vec<Scalar> {
        if let Some(done) = self.computations.get(&Arc::as_ptr(of)) {
            return done.clone();
        }
        let arguments = of.arguments.iter().map(|argument| self.scalar(argument)).collect();
        let (results, function) = (of.results, Arc::clone(&of.function));
        let bound = Computation { arguments, results, function }.simplified();
        self.computations.insert(Arc::as_ptr(of), bound.clone());
        bound
    }

    fn reduction(&mut self, reduction: &Arc<Reduction>) -> Arc<Reduction> {
        if let Some(done) = self.reductions.get(&Arc::as_ptr(reduction)) {
            return Arc::clone(done);
        }
        let left = self.value(&reduction.left);
        let right = reduction.right.as_ref().map(|right| self.value(right));
        let (kind, scope) = (reduction.kind, reduction.scope);
        let bound = self.unified.reduction(Reduction { kind, left, right, scope });
        self.reductions.insert(Arc::as_ptr(reduction), Arc::clone(&bound));
        bound
    }

    fn ranking(&mut self, ranking: &Arc<Ranking>) -> Arc<Ranking> {
        if let Some(done) = self.rankings.get(&Arc::as_ptr(ranking)) {
            return Arc::clone(done);
        }
        let Ranking { among, pick, .. } = **ranking;
        let value = self.value(&ranking.value);
        let bound = self.unified.ranking(Ranking { value, among, pick });
        self.rankings.insert(Arc::as_ptr(ranking), Arc::clone(&bound));
        bound
    }

    fn selection(&mut self, selection: &Arc<Selection>) -> Arc<Selection> {
        if let Some(done) = self.selections.get(&Arc::as_ptr(selection)) {
            return Arc::clone(done);
        }
        let value = self.value(&selection.value);
        let count = self.scalar(&selection.count);
        let bound = self.unified.selection(Selection { value, count });
        self.selections.insert(Arc::as_ptr(selection), Arc::clone(&bound));
        bound
    }
}
