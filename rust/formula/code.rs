//! Compiles expressions whose scalars are all known to a list of vector instructions.
//!
//! One instruction does one operation on a chunk of elements. Values live in slots, each a buffer
//! of one chunk; a slot is used again as soon as its value was used for the last time, so that the
//! whole working set stays in the first-level cache.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};

use super::masks::MaskName;
use super::{BinaryOp, Chosen, Scalar, ScalarNode, Scope, UnaryOp, Value, ValueNode};

/// The index of a buffer of one chunk.
pub(crate) type Slot = usize;

/// An operand: a chunk, or the same number for every element.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    Slot(Slot),
    Number(f64),
}

/// One step of the computation of a chunk.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    /// Widens a chunk of an input.
    Load {
        input: usize,
    },
    /// Widens a chunk of an input and subtracts a base: a task vector.
    LoadDifference {
        input: usize,
        base: Slot,
    },
    /// The same number everywhere.
    Fill {
        number: f64,
    },
    /// Repeats a number a row (column) over its elements.
    Spread {
        axis: Scope,
        first: u64,
        values: Arc<Vec<f64>>,
    },
    Unary {
        op: UnaryOp,
        a: Slot,
    },
    Binary {
        op: BinaryOp,
        a: Argument,
        b: Argument,
    },
    Select {
        mask: Slot,
        yes: Argument,
        no: Argument,
    },
    WeightedSum {
        terms: Vec<(f64, Slot)>,
    },
    Elect {
        terms: Vec<(f64, Slot)>,
        average: bool,
    },
    Kept {
        a: Slot,
        chosen: Chosen,
    },
    /// What a cut of the magnitudes keeps, else 0.
    Trim {
        a: Slot,
        chosen: Chosen,
    },
    Random {
        keep_below: u64,
        stream: u32,
    },
    /// What a random mask keeps, else 0, times a number.
    Drop {
        a: Slot,
        keep_below: u64,
        stream: u32,
        scale: f64,
    },
}

/// An operation and the slot its result goes to.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    pub(crate) out: Slot,
}

/// A compiled list of expressions.
#[derive(Clone, Debug)]
pub(crate) struct Code {
    pub(crate) instructions: Vec<Instruction>,
    /// Where each expression's value is, when all instructions have run.
    pub(crate) results: Vec<Argument>,
    pub(crate) slots: usize,
}

impl Code {
    /// Compiles `values`; an error if a scalar in them is not known when all passes are over.
    pub(crate) fn compile(values: &[Value]) -> Result<Self> {
        let mut emitter = Emitter::default();
        let results: Vec<Argument> = values.iter().map(|value| emitter.value(value)).collect();
        match emitter.unknown.take() {
            Some(unknown) => Err(Error::plan("a formula needs a number that no pass can give")
                .found(unknown)
                .advice("see what a scalar may depend on, in rust/methods/ADDING.md")),
            None => Ok(emitter.allocate(results)),
        }
    }
}

/// Emits instructions in single-assignment form: each result has a number of its own.
#[derive(Default)]
struct Emitter {
    instructions: Vec<Instruction>,
    done: HashMap<*const ValueNode, Argument>,
    loads: HashMap<usize, Slot>,
    /// The first scalar or selection that is not known.
    unknown: Option<String>,
}

impl Emitter {
    fn value(&mut self, value: &Value) -> Argument {
        let key = Arc::as_ptr(&value.0);
        if let Some(&done) = self.done.get(&key) {
            return done;
        }
        let argument = match &*value.0 {
            ValueNode::Scalar(scalar) => self.scalar(scalar),
            ValueNode::Input(index) => Argument::Slot(self.load(*index)),
            node => {
                let fused = self.fused(value);
                let operation = fused.unwrap_or_else(|| self.operation(node));
                Argument::Slot(self.emit(operation))
            }
        };
        self.done.insert(key, argument);
        argument
    }

    fn scalar(&mut self, scalar: &Scalar) -> Argument {
        match &*scalar.0 {
            ScalarNode::Constant(number) => Argument::Number(*number),
            ScalarNode::Vector { axis, first, values } => {
                let (axis, first, values) = (*axis, *first, Arc::clone(values));
                Argument::Slot(self.emit(Operation::Spread { axis, first, values }))
            }
            _ => self.unknown(format!("{scalar:?}")),
        }
    }

    fn load(&mut self, input: usize) -> Slot {
        if let Some(&slot) = self.loads.get(&input) {
            return slot;
        }
        let slot = self.emit(Operation::Load { input });
        self.loads.insert(input, slot);
        slot
    }

    /// The operations that stand for two or three: what a bench showed to be worth it.
    fn fused(&mut self, value: &Value) -> Option<Operation> {
        if let Some(dropped) = self.dropped(value, 1.0) {
            return Some(dropped);
        }
        match &*value.0 {
            ValueNode::Binary(BinaryOp::Sub, x, base) => match &*x.0 {
                ValueNode::Input(input) if !self.loads.contains_key(input) => {
                    let base = self.slot(base);
                    Some(Operation::LoadDifference { input: *input, base })
                }
                _ => None,
            },
            ValueNode::Select { mask, yes, no } => {
                let chosen = magnitudes_kept(mask, yes, no)?;
                Some(Operation::Trim { a: self.slot(yes), chosen })
            }
            ValueNode::WeightedSum(terms) => {
                let [(scale, value)] = terms.as_slice() else { return None };
                self.dropped(value, scale.as_constant()?)
            }
            _ => None,
        }
    }

    fn dropped(&mut self, value: &Value, scale: f64) -> Option<Operation> {
        let ((stream, keep_below), whole) = value.randomly_kept()?;
        Some(Operation::Drop { a: self.slot(whole), keep_below, stream, scale })
    }

    fn operation(&mut self, node: &ValueNode) -> Operation {
        match node {
            ValueNode::Input(_) | ValueNode::Scalar(_) => unreachable!("these are arguments"),
            ValueNode::Unary(op, a) => Operation::Unary { op: *op, a: self.slot(a) },
            ValueNode::Binary(op, a, b) => {
                let (a, b) = (self.value(a), self.value(b));
                Operation::Binary { op: *op, a, b }
            }
            ValueNode::Select { mask, yes, no } => {
                let mask = self.slot(mask);
                let (yes, no) = (self.value(yes), self.value(no));
                Operation::Select { mask, yes, no }
            }
            ValueNode::WeightedSum(terms) => self.weighted_sum(terms),
            ValueNode::Elect { terms, average } => {
                let terms = terms.iter().map(|(w, value)| (*w, self.slot(value))).collect();
                Operation::Elect { terms, average: *average }
            }
            ValueNode::Keep(_) => {
                self.unknown("a selection".to_owned());
                Operation::Fill { number: f64::NAN }
            }
            ValueNode::Kept { value, chosen } => {
                Operation::Kept { a: self.slot(value), chosen: *chosen }
            }
            ValueNode::Random { keep_below, stream } => {
                Operation::Random { keep_below: *keep_below, stream: *stream }
            }
        }
    }

    /// One fused instruction, or products and sums where a coefficient differs by row or column.
    fn weighted_sum(&mut self, terms: &[(Scalar, Value)]) -> Operation {
        let numbers: Option<Vec<f64>> = terms.iter().map(|(c, _)| c.as_constant()).collect();
        if let Some(numbers) = numbers {
            let slots: Vec<Slot> = terms.iter().map(|(_, value)| self.slot(value)).collect();
            return Operation::WeightedSum { terms: numbers.into_iter().zip(slots).collect() };
        }
        let mut sum: Option<Slot> = None;
        for (coefficient, value) in terms {
            let (a, b) = (self.scalar(coefficient), self.value(value));
            let product = self.emit(Operation::Binary { op: BinaryOp::Mul, a, b });
            sum = Some(match sum {
                None => product,
                Some(sum) => {
                    let (a, b) = (Argument::Slot(sum), Argument::Slot(product));
                    self.emit(Operation::Binary { op: BinaryOp::Add, a, b })
                }
            });
        }
        assert!(sum.is_some(), "a weighted sum has a term");
        // The last addition is emitted again by the caller as its own result.
        self.instructions.pop().map_or(Operation::Fill { number: 0.0 }, |last| last.operation)
    }

    fn unknown(&mut self, what: String) -> Argument {
        self.unknown.get_or_insert(what);
        Argument::Number(f64::NAN)
    }

    fn slot(&mut self, value: &Value) -> Slot {
        match self.value(value) {
            Argument::Slot(slot) => slot,
            Argument::Number(number) => self.emit(Operation::Fill { number }),
        }
    }

    fn emit(&mut self, operation: Operation) -> Slot {
        let out = self.instructions.len();
        self.instructions.push(Instruction { operation, out });
        out
    }

    /// Maps single-assignment numbers to as few slots as the uses allow.
    fn allocate(mut self, mut results: Vec<Argument>) -> Code {
        let mut last_use: Vec<usize> = (0..self.instructions.len()).collect();
        for (at, instruction) in self.instructions.iter_mut().enumerate() {
            instruction.operation.each_slot(|slot| last_use[*slot] = at);
        }
        for result in &results {
            if let Argument::Slot(slot) = result {
                last_use[*slot] = usize::MAX;
            }
        }
        let (mut place, mut free, mut slots) = (vec![0; last_use.len()], Vec::new(), 0);
        for (at, instruction) in self.instructions.iter_mut().enumerate() {
            // The result never shares a slot with an operand: kernels do not work in place.
            place[at] = free.pop().unwrap_or_else(|| {
                slots += 1;
                slots - 1
            });
            let mut freed = Vec::new();
            instruction.operation.each_slot(|slot| {
                if last_use[*slot] == at && !freed.contains(&place[*slot]) {
                    freed.push(place[*slot]);
                }
                *slot = place[*slot];
            });
            if last_use[at] == at {
                freed.push(place[at]);
            }
            instruction.out = place[at];
            free.append(&mut freed);
        }
        for result in &mut results {
            if let Argument::Slot(slot) = result {
                *slot = place[*slot];
            }
        }
        Code { instructions: self.instructions, results, slots }
    }
}

impl Operation {
    fn each_slot(&mut self, mut visit: impl FnMut(&mut Slot)) {
        let mut argument = |argument: &mut Argument| {
            if let Argument::Slot(slot) = argument {
                visit(slot);
            }
        };
        match self {
            Self::Load { .. } | Self::Fill { .. } | Self::Spread { .. } | Self::Random { .. } => {}
            Self::Unary { a, .. }
            | Self::Kept { a, .. }
            | Self::Trim { a, .. }
            | Self::Drop { a, .. } => visit(a),
            Self::LoadDifference { base, .. } => visit(base),
            Self::Binary { a, b, .. } => {
                argument(a);
                argument(b);
            }
            Self::Select { mask, yes, no } => {
                argument(yes);
                argument(no);
                visit(mask);
            }
            Self::WeightedSum { terms } | Self::Elect { terms, .. } => {
                terms.iter_mut().for_each(|(_, slot)| visit(slot));
            }
        }
    }
}

/// Whether `mask ? yes : no` is `yes` where a cut of its magnitudes keeps it, else 0.
fn magnitudes_kept(mask: &Value, yes: &Value, no: &Value) -> Option<Chosen> {
    let ValueNode::Kept { value, chosen } = &*mask.0 else { return None };
    let ValueNode::Unary(UnaryOp::Abs, magnitude_of) = &*value.0 else { return None };
    (is_zero(no) && Arc::ptr_eq(&magnitude_of.0, &yes.0)).then_some(*chosen)
}

impl Value {
    /// The random mask and the whole, if this is what the mask keeps of it, else 0.
    pub(crate) fn randomly_kept(&self) -> Option<(MaskName, &Self)> {
        let ValueNode::Select { mask, yes, no } = &*self.0 else { return None };
        let ValueNode::Random { keep_below, stream } = *mask.0 else { return None };
        is_zero(no).then_some(((stream, keep_below), yes))
    }
}

/// Whether `value` is +0 everywhere.
fn is_zero(value: &Value) -> bool {
    let ValueNode::Scalar(scalar) = &*value.0 else { return false };
    scalar.as_constant().is_some_and(|zero| zero == 0.0 && zero.is_sign_positive())
}
