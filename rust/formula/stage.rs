//! Finds what has to be reduced before an expression can be computed, and in which order.

use std::collections::HashSet;
use std::sync::Arc;

use super::machine::TensorFrame;
use super::{MaskName, Ranking, Reduction, Scalar, ScalarNode, Scope, Selection, Value, ValueNode};

/// Reductions, selections and rankings that can run in the same pass over the tensor.
#[derive(Default, Clone)]
pub(crate) struct Stage {
    pub(crate) reductions: Vec<Arc<Reduction>>,
    pub(crate) selections: Vec<Arc<Selection>>,
    pub(crate) rankings: Vec<Arc<Ranking>>,
    /// Selections whose threshold the formula computes with.
    thresholds: Vec<Arc<Selection>>,
}

impl Stage {
    pub(crate) fn is_empty(&self) -> bool {
        self.reductions.is_empty() && self.selections.is_empty() && self.rankings.is_empty()
    }

    /// Whether it gives numbers, which become part of the formula. What is kept does not.
    pub(crate) fn gives_numbers(&self) -> bool {
        let has_threshold = |selection: &Arc<Selection>| {
            self.thresholds.iter().any(|other| Arc::ptr_eq(selection, other))
        };
        !self.reductions.is_empty() || self.selections.iter().any(has_threshold)
    }

    /// What its reductions run over; selections are of the tensor.
    pub(crate) fn scope(&self) -> Option<Scope> {
        self.reductions.first().map(|reduction| reduction.scope)
    }
}

/// Everything an expression depends on, dependencies first.
#[derive(Default)]
struct Dependencies {
    stage: Stage,
    inputs: Vec<usize>,
    masks: Vec<MaskName>,
    /// Whether what is computed for an element depends on where it lies.
    by_place: bool,
    /// Numbers a row that are computed from others.
    computed: usize,
    /// Whether what rows are reduced from is left out.
    stops_at_rows: bool,
    seen: HashSet<*const ()>,
}

impl Dependencies {
    fn of(values: &[Value]) -> Self {
        let mut dependencies = Self::default();
        values.iter().for_each(|value| dependencies.value(value));
        dependencies
    }

    fn is_new<N>(&mut self, node: &Arc<N>) -> bool {
        self.seen.insert(Arc::as_ptr(node).cast())
    }

    fn value(&mut self, value: &Value) {
        if !self.is_new(&value.0) {
            return;
        }
        match &*value.0 {
            ValueNode::Input(index) => {
                if !self.inputs.contains(index) {
                    self.inputs.push(*index);
                }
            }
            ValueNode::Random { keep_below, stream } => {
                let name = (*stream, *keep_below);
                if !self.masks.contains(&name) {
                    self.masks.push(name);
                }
            }
            ValueNode::Marked(_) => self.by_place = true,
            ValueNode::Scalar(scalar) => self.scalar(scalar),
            ValueNode::Unary(_, a) | ValueNode::Kept { value: a, .. } => self.value(a),
            ValueNode::Binary(_, a, b) => {
                self.value(a);
                self.value(b);
            }
            ValueNode::Select { mask, yes, no } => {
                self.value(mask);
                self.value(yes);
                self.value(no);
            }
            ValueNode::WeightedSum(terms) => {
                for (coefficient, term) in terms {
                    self.scalar(coefficient);
                    self.value(term);
                }
            }
            ValueNode::Elect { terms, .. } => terms.iter().for_each(|(_, term)| self.value(term)),
            ValueNode::Keep(selection) => self.selection(selection),
            ValueNode::ByRank(ranking) => self.ranking(ranking),
        }
    }

    fn scalar(&mut self, scalar: &Scalar) {
        match &*scalar.0 {
            ScalarNode::Constant(_) => {}
            ScalarNode::Vector { .. } => self.by_place = true,
            ScalarNode::Reduction(reduction) => self.reduction(reduction),
            ScalarNode::Threshold(selection) => {
                self.stage.thresholds.push(Arc::clone(selection));
                self.selection(selection);
            }
            ScalarNode::Computed { of, .. } => {
                if self.is_new(of) {
                    let is_by_row = scalar.scope() == Some(Scope::Row);
                    self.computed += if is_by_row { of.results } else { 0 };
                    of.arguments.iter().for_each(|argument| self.scalar(argument));
                }
            }
        }
    }

    fn reduction(&mut self, reduction: &Arc<Reduction>) {
        if self.is_new(reduction) {
            if !(self.stops_at_rows && reduction.scope == Scope::Row) {
                self.value(&reduction.left);
                reduction.right.iter().for_each(|right| self.value(right));
            }
            self.stage.reductions.push(Arc::clone(reduction));
        }
    }

    fn ranking(&mut self, ranking: &Arc<Ranking>) {
        if self.is_new(ranking) {
            self.value(&ranking.value);
            self.stage.rankings.push(Arc::clone(ranking));
        }
    }

    fn selection(&mut self, selection: &Arc<Selection>) {
        if self.is_new(selection) {
            self.value(&selection.value);
            self.scalar(&selection.count);
            self.stage.selections.push(Arc::clone(selection));
        }
    }
}

/// Whether `number` is found in one pass over the tensor.
pub(crate) fn is_of_one_pass(number: &Value) -> bool {
    let ValueNode::Scalar(scalar) = &*number.0 else { return false };
    match &*scalar.0 {
        ScalarNode::Constant(_) => true,
        ScalarNode::Reduction(of) => of.scope == Scope::Tensor && unknown(&operands(of)).is_empty(),
        _ => false,
    }
}

/// Whether all that `values` wait for is which elements some selections keep, of values that wait for
/// nothing, and so one pass finds; and where an element lies has no other say in it.
pub(crate) fn waits_for_cuts_alone(values: &[Value]) -> bool {
    let Dependencies { stage, masks, by_place, .. } = Dependencies::of(values);
    let Stage { reductions, selections, rankings, thresholds } = stage;
    let is_ready = |selection: &Arc<Selection>| {
        let waits = unknown(std::slice::from_ref(&selection.value));
        selection.count.as_constant().is_some() && waits.is_empty()
    };
    reductions.is_empty()
        && rankings.is_empty()
        && thresholds.is_empty()
        && masks.is_empty()
        && !by_place
        && !selections.is_empty()
        && selections.iter().all(is_ready)
}

/// The inputs that computing `values` reads, in listed order.
pub(crate) fn inputs_of(values: &[Value]) -> Vec<usize> {
    let mut inputs = Dependencies::of(values).inputs;
    inputs.sort_unstable();
    inputs
}

/// The random masks that computing `values` draws.
pub(crate) fn masks_of(values: &[Value]) -> Vec<MaskName> {
    Dependencies::of(values).masks
}

/// Everything `values` still wait for, dependencies first.
pub(crate) fn unknown(values: &[Value]) -> Stage {
    Dependencies::of(values).stage
}

/// Whether `values` wait for nothing but what is reduced over the model, if for anything.
pub(crate) fn wait_for_model_alone(values: &[Value]) -> bool {
    let Stage { reductions, selections, rankings, .. } = unknown(values);
    let is_of_model = |reduction: &Arc<Reduction>| reduction.scope == Scope::Model;
    reductions.iter().all(is_of_model) && selections.is_empty() && rankings.is_empty()
}

/// What a reduction reads.
pub(crate) fn operands(reduction: &Reduction) -> Vec<Value> {
    std::iter::once(&reduction.left).chain(&reduction.right).cloned().collect()
}

/// Whether `values` wait for nothing that a pass over a tensor has to give.
///
/// Rows are no such thing: short rows can be reduced and ranked again wherever they are needed. Long
/// ones are so once, in a pass of their own, but not in a sweep over the model, which has no other.
fn is_ready(values: &[Value], frame: &TensorFrame, is_sweep: bool) -> bool {
    let waits = unknown(values);
    let stored_rows = frame.stores_rows() && !is_sweep;
    let needs_pass = |reduction: &Arc<Reduction>| reduction.scope != Scope::Row || stored_rows;
    let needs_ranks = |ranking: &Arc<Ranking>| is_sweep || frame.stores_marks(ranking.among);
    waits.selections.is_empty()
        && !waits.reductions.iter().any(needs_pass)
        && !waits.rankings.iter().any(needs_ranks)
}

/// The next pass: reductions over `scope`, and selections, that are ready.
pub(crate) fn next_stage(values: &[Value], scope: Scope, frame: &TensorFrame) -> Stage {
    let is_ready = |values: &[Value]| is_ready(values, frame, scope == Scope::Model);
    let all = unknown(values);
    let mut stage = Stage { thresholds: all.thresholds, ..Stage::default() };
    for reduction in all.reductions {
        if reduction.scope == scope && is_ready(&operands(&reduction)) {
            stage.reductions.push(reduction);
        }
    }
    if scope == Scope::Tensor {
        for selection in all.selections {
            let counted = selection.count.as_constant().is_some();
            if counted && is_ready(std::slice::from_ref(&selection.value)) {
                stage.selections.push(selection);
            }
        }
    }
    stage
}

/// The reductions by row that passes over the tensor need before the last one; not those that others by
/// row alone need.
pub(crate) fn rows_of_passes(values: &[Value]) -> Vec<Arc<Reduction>> {
    let all = unknown(values);
    let mut needed = Dependencies { stops_at_rows: true, ..Dependencies::default() };
    let has_pass = |scope| matches!(scope, Scope::Tensor | Scope::Column);
    let reductions = all.reductions.iter().filter(|reduction| has_pass(reduction.scope));
    reductions.for_each(|reduction| needed.reduction(reduction));
    all.selections.iter().for_each(|selection| needed.selection(selection));
    let mut reductions = needed.stage.reductions;
    reductions.retain(|reduction| reduction.scope == Scope::Row);
    reductions
}

/// Bytes of all that is known of short rows if what passes over the tensor need of them is kept.
pub(crate) fn kept_rows_bytes(values: &[Value], frame: &TensorFrame) -> u64 {
    let kept = rows_of_passes(values).len();
    if kept == 0 || !frame.keeps_rows() {
        return 0;
    }
    let numbers = kept + Dependencies::of(values).computed;
    (numbers * size_of::<f64>()) as u64 * frame.rows()
}

/// The next pass that reduces short rows, to keep the results: of those that passes over the tensor need,
/// the ones that are ready.
pub(crate) fn next_rows(values: &[Value], frame: &TensorFrame) -> Stage {
    let mut reductions = rows_of_passes(values);
    reductions.retain(|reduction| is_ready(&operands(reduction), frame, false));
    Stage { reductions, ..Stage::default() }
}

/// The next pass that ranks long vectors: those of one shape, whose values are ready.
pub(crate) fn next_rankings(values: &[Value], frame: &TensorFrame) -> Stage {
    let mut rankings = unknown(values).rankings;
    rankings.retain(|ranking| {
        let value = std::slice::from_ref(&ranking.value);
        frame.stores_marks(ranking.among) && is_ready(value, frame, false)
    });
    let first = rankings.first().map(|ranking| ranking.among);
    rankings.retain(|ranking| Some(ranking.among) == first);
    Stage { rankings, ..Stage::default() }
}

/// Whether nothing but the values themselves, and columns, wait for a column to be reduced, and
/// nothing for a row: then columns can be reduced and combined band by band.
pub(crate) fn columns_come_last(values: &[Value]) -> bool {
    let all = unknown(values);
    let waits_for_a_column = |values: &[Value]| {
        unknown(values).reductions.iter().any(|reduction| reduction.scope == Scope::Column)
    };
    let reductions = &all.reductions;
    reductions.iter().any(|reduction| reduction.scope == Scope::Column)
        && all.rankings.is_empty()
        && reductions.iter().all(|reduction| match reduction.scope {
            Scope::Column => true,
            Scope::Row => false,
            Scope::Tensor | Scope::Model => !waits_for_a_column(&operands(reduction)),
        })
        && all.selections.iter().all(|selection| {
            let count = Value::scalar(selection.count.clone());
            !waits_for_a_column(&[selection.value.clone(), count])
        })
}

/// The rows that `values` wait for to be reduced or ranked.
///
/// Call it when nothing of a wider scope is left.
pub(crate) fn unknown_rows(values: &[Value]) -> Stage {
    let mut stage = unknown(values);
    stage.reductions.retain(|reduction| reduction.scope == Scope::Row);
    stage
}
