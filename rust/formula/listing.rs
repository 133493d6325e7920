//! A formula as plain data: a list of nodes, each of which names only nodes before it.
//!
//! This is how Python hands over what a method of its own returns. The constructors of the language
//! build it, so the same rules act on it as on a method written in Rust.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::Deserialize;

use super::{
    Among, BinaryOp, Computation, Pick, Reduction, ReductionKind, Scalar, ScalarNode, Scope,
    UnaryOp, Value, compute,
};
use crate::error::{Error, Result};
use crate::kernels::CANCELLED;
use crate::plan::{Formula, HostFunction};

/// A node; other nodes are named by their index in the list.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Node {
    Input {
        index: usize,
    },
    /// As text, so that infinities and NaN are among them.
    Number {
        value: String,
    },
    Spread {
        of: usize,
    },
    Unary {
        name: UnaryName,
        of: usize,
    },
    Binary {
        name: BinaryName,
        left: usize,
        right: usize,
    },
    Select {
        mask: usize,
        yes: usize,
        no: usize,
    },
    WeightedSum {
        terms: Vec<(usize, usize)>,
    },
    Vote {
        terms: Vec<(usize, usize)>,
        average: bool,
    },
    Random {
        density: f64,
        stream: u32,
    },
    Largest {
        of: usize,
        count: usize,
    },
    OrderStatistic {
        of: usize,
        count: usize,
    },
    LargestInRow {
        of: usize,
        count: u64,
        every: Option<u64>,
    },
    RandomByRank {
        of: usize,
        lowest: f64,
        highest: f64,
        stream: u32,
        every: Option<u64>,
    },
    Reduce {
        name: ReductionName,
        left: usize,
        right: Option<usize>,
        over: ScopeName,
    },
    ScalarUnary {
        name: UnaryName,
        of: usize,
    },
    ScalarBinary {
        name: BinaryName,
        left: usize,
        right: usize,
    },
    ScalarSelect {
        mask: usize,
        yes: usize,
        no: usize,
    },
    Compute {
        function: usize,
        arguments: Vec<usize>,
        results: usize,
    },
    /// One of the results of a `Compute`.
    Result {
        of: usize,
        index: usize,
    },
}

macro_rules! named {
    ($name:ident for $target:ident: $($variant:ident),*) => {
        #[derive(Clone, Copy, Debug, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum $name { $($variant),* }

        impl From<$name> for $target {
            fn from(name: $name) -> Self {
                match name { $($name::$variant => Self::$variant),* }
            }
        }
    };
}
named!(UnaryName for UnaryOp: Neg, Abs, Sign, Sqrt, Exp, Ln);
named!(BinaryName for BinaryOp: Add, Sub, Mul, Div, Max, Min, Greater, GreaterEqual, Equal);
named!(ReductionName for ReductionKind: Sum, AbsoluteSum, Dot, Max);
named!(ScopeName for Scope: Model, Tensor, Row, Column);

/// What a node became.
enum Built {
    Value(Value),
    Scalar(Scalar),
    Results(Vec<Scalar>),
}

/// How many nodes may lie one in the other: formulas are gone through from the outside inwards, on
/// stacks of a thread's size.
const DEEPEST: usize = 1000;

/// What `formula` stands for, which is its last node, for a tensor with so many inputs.
pub fn read(formula: &Formula, inputs: usize) -> Result<Value> {
    let nodes: Vec<Node> = serde_json::from_str(&formula.nodes)
        .map_err(|error| Error::plan(format!("a formula cannot be read: {error}")))?;
    check(&nodes)?;
    let functions = &formula.functions;
    let mut reader = Reader { built: Vec::with_capacity(nodes.len()), inputs, functions };
    for node in nodes {
        let built = reader.build(node)?;
        reader.built.push(built);
    }
    match reader.built.pop() {
        Some(Built::Value(value)) => Ok(value),
        Some(Built::Scalar(scalar)) => Ok(Value::scalar(scalar)),
        Some(Built::Results(_)) | None => Err(Error::plan("a formula ends with no value")),
    }
}

/// What is known of a node before the formula is built.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of a node, by itself")]
struct Facts {
    /// How many nodes lie one in the other, with it.
    depth: usize,
    /// Whether it is a number for each row, and for each column.
    by_row: bool,
    by_column: bool,
    /// Whether a pass over the tensor has to find something first; rows need none.
    waits: bool,
    /// Whether something is ranked, which a sweep over the model does not do.
    ranked: bool,
}

/// Checks that a formula is not nested too deep, and that some pass can give every number.
fn check(nodes: &[Node]) -> Result<()> {
    let mut all: Vec<Facts> = Vec::with_capacity(nodes.len());
    for node in nodes {
        // A part that is not there is told when the formula is built.
        let of = |part: usize| all.get(part).copied().unwrap_or_default();
        let mut facts = Facts { depth: 1, ..Facts::default() };
        for part in node.parts().into_iter().map(of) {
            facts.depth = facts.depth.max(part.depth + 1);
            facts.by_row |= part.by_row;
            facts.by_column |= part.by_column;
            facts.waits |= part.waits;
            facts.ranked |= part.ranked;
        }
        match *node {
            Node::Largest { count, .. } | Node::OrderStatistic { count, .. } => {
                if of(count).by_row || of(count).by_column {
                    let message = "a count or a rank is one number for the whole tensor";
                    return Err(Error::plan(message)
                        .found("one for each row or column")
                        .advice("reduce it over the tensor"));
                }
                let (depth, ranked) = (facts.depth, facts.ranked);
                facts = Facts { depth, waits: true, ranked, ..Facts::default() };
            }
            Node::Reduce { over: ScopeName::Model, .. } if facts.waits || facts.ranked => {
                let message = "a number over the model depends on another that comes first";
                return Err(Error::plan(message)
                    .expected("elements, and numbers over rows")
                    .advice("combine numbers over the model with each other instead"));
            }
            Node::Reduce { over, .. } => {
                facts.by_row = matches!(over, ScopeName::Row);
                facts.by_column = matches!(over, ScopeName::Column);
                facts.waits |= !facts.by_row;
            }
            Node::ScalarBinary { .. } | Node::ScalarSelect { .. } | Node::Compute { .. }
                if facts.by_row && facts.by_column =>
            {
                let message = "a number cannot be of a row and of a column at once";
                return Err(
                    Error::plan(message).advice("multiply the values by one after the other")
                );
            }
            // Elements may be of both.
            Node::Spread { .. }
            | Node::WeightedSum { .. }
            | Node::Vote { .. }
            | Node::LargestInRow { .. }
            | Node::RandomByRank { .. } => {
                (facts.by_row, facts.by_column) = (false, false);
                facts.ranked |=
                    matches!(node, Node::LargestInRow { .. } | Node::RandomByRank { .. });
            }
            _ => {}
        }
        all.push(facts);
    }
    match all.iter().map(|facts| facts.depth).max() {
        Some(depth) if depth > DEEPEST => Err(Error::plan("a formula is nested too deep")
            .expected(format_args!("at most {DEEPEST} operations one in the other"))
            .found(depth)
            .advice("add many values by one `weighted_sum`")),
        _ => Ok(()),
    }
}

impl Node {
    /// The nodes that it is made of.
    fn parts(&self) -> Vec<usize> {
        match self {
            Self::Input { .. } | Self::Number { .. } | Self::Random { .. } => Vec::new(),
            Self::Spread { of }
            | Self::Unary { of, .. }
            | Self::ScalarUnary { of, .. }
            | Self::LargestInRow { of, .. }
            | Self::RandomByRank { of, .. }
            | Self::Result { of, .. } => vec![*of],
            Self::Binary { left, right, .. } | Self::ScalarBinary { left, right, .. } => {
                vec![*left, *right]
            }
            Self::Select { mask, yes, no } | Self::ScalarSelect { mask, yes, no } => {
                vec![*mask, *yes, *no]
            }
            Self::WeightedSum { terms } | Self::Vote { terms, .. } => {
                terms.iter().flat_map(|&(weight, value)| [weight, value]).collect()
            }
            Self::Largest { of, count } | Self::OrderStatistic { of, count } => vec![*of, *count],
            Self::Reduce { left, right, .. } => [*left].into_iter().chain(*right).collect(),
            Self::Compute { arguments, .. } => arguments.clone(),
        }
    }
}

struct Reader<'a> {
    built: Vec<Built>,
    inputs: usize,
    functions: &'a [HostFunction],
}

impl Reader<'_> {
    fn build(&self, node: Node) -> Result<Built> {
        Ok(match node {
            Node::Input { index } if index < self.inputs => Built::Value(Value::input(index)),
            Node::Input { index } => {
                return Err(Error::plan(format!(
                    "a formula uses input {index}, which is not there"
                )));
            }
            Node::Number { value } => {
                let number = value.parse::<f64>();
                let number = number.map_err(|_| Error::plan(format!("`{value}` is no number")))?;
                Built::Scalar(Scalar::constant(number))
            }
            Node::Spread { of } => Built::Value(Value::scalar(self.scalar(of)?)),
            Node::Unary { name, of } => Built::Value(self.value(of)?.unary(name.into())),
            Node::Binary { name, left, right } => {
                Built::Value(self.value(left)?.binary(name.into(), self.value(right)?))
            }
            Node::Select { mask, yes, no } => {
                Built::Value(self.value(mask)?.select(self.value(yes)?, self.value(no)?))
            }
            Node::WeightedSum { terms } => Built::Value(Value::weighted_sum(self.terms(&terms)?)),
            Node::Vote { terms, average } => {
                Built::Value(Value::vote(self.terms(&terms)?, average))
            }
            Node::Random { density, stream } => Built::Value(Value::random_mask(density, stream)),
            Node::Largest { of, count } => {
                Built::Value(self.value(of)?.largest(self.scalar(count)?))
            }
            Node::OrderStatistic { of, count } => {
                Built::Scalar(self.value(of)?.order_statistic(self.scalar(count)?))
            }
            Node::LargestInRow { of, count, every } => {
                let pick = Pick::Largest(count);
                Built::Value(self.value(of)?.picked_by_rank(among(every), pick))
            }
            Node::RandomByRank { of, lowest, highest, stream, every } => {
                if [lowest, highest].iter().any(|each| !(0.0..=1.0).contains(each)) {
                    return Err(Error::plan("a probability lies from 0 to 1"));
                }
                let pick = Pick::Random { lowest, highest, stream };
                Built::Value(self.value(of)?.picked_by_rank(among(every), pick))
            }
            Node::Reduce { name, left, right, over } => {
                let right = right.map(|right| self.value(right).cloned()).transpose()?;
                let (kind, left) = (name.into(), self.value(left)?.clone());
                if right.is_some() != (kind == ReductionKind::Dot) {
                    return Err(Error::plan("an inner product is of two values, others of one"));
                }
                let reduction = Reduction { kind, left, right, scope: over.into() };
                Built::Scalar(Scalar(Arc::new(ScalarNode::Reduction(Arc::new(reduction)))))
            }
            Node::ScalarUnary { name, of } => Built::Scalar(self.scalar(of)?.unary(name.into())),
            Node::ScalarBinary { name, left, right } => {
                Built::Scalar(self.scalar(left)?.binary(name.into(), &self.scalar(right)?))
            }
            Node::ScalarSelect { mask, yes, no } => {
                Built::Scalar(self.scalar(mask)?.select(&self.scalar(yes)?, &self.scalar(no)?))
            }
            Node::Compute { function, arguments, results } => {
                let function = self.functions.get(function).cloned();
                let function = function
                    .ok_or_else(|| Error::plan("a formula calls a function that is not there"))?;
                let arguments = arguments
                    .into_iter()
                    .map(|argument| self.scalar(argument))
                    .collect::<Result<Vec<_>>>()?;
                let computation = Computation { arguments, results, function };
                // Of constants it is called at once, and what it raises unwinds.
                let called = catch_unwind(AssertUnwindSafe(|| computation.simplified()));
                let failed = |_| Error::plan("a function of a formula failed");
                Built::Results(called.map_err(failed)?)
            }
            Node::Result { of, index } => match self.built.get(of) {
                Some(Built::Results(results)) if index < results.len() => {
                    Built::Scalar(results[index].clone())
                }
                _ => return Err(misplaced(of, "a result")),
            },
        })
    }

    fn value(&self, index: usize) -> Result<&Value> {
        match self.built.get(index) {
            Some(Built::Value(value)) => Ok(value),
            _ => Err(misplaced(index, "a value")),
        }
    }

    fn scalar(&self, index: usize) -> Result<Scalar> {
        match self.built.get(index) {
            Some(Built::Scalar(scalar)) => Ok(scalar.clone()),
            _ => Err(misplaced(index, "a scalar")),
        }
    }

    fn terms(&self, terms: &[(usize, usize)]) -> Result<Vec<(Scalar, Value)>> {
        terms
            .iter()
            .map(|&(scalar, value)| Ok((self.scalar(scalar)?, self.value(value)?.clone())))
            .collect()
    }
}

fn among(every: Option<u64>) -> Among {
    every.map_or(Among::Row, Among::Group)
}

fn misplaced(index: usize, what: &str) -> Error {
    Error::plan(format!("node {index} of a formula should be {what}"))
}

/// Arithmetic on numbers about a tensor: in f64, with the operations that elements have.
impl Scalar {
    /// A function of one number.
    pub fn unary(&self, op: UnaryOp) -> Self {
        let function = move |a: f64| match op {
            UnaryOp::Neg => -a,
            UnaryOp::Abs => a.abs(),
            UnaryOp::Sign if a == 0.0 || a.is_nan() => a,
            UnaryOp::Sign => a.signum(),
            UnaryOp::Sqrt => a.sqrt(),
            UnaryOp::Exp => libm::exp(a),
            UnaryOp::Ln => libm::log(a),
        };
        only(compute(std::slice::from_ref(self), 1, move |a| vec![function(a[0])]))
    }

    /// A function of two numbers; comparisons give 1 or 0.
    pub fn binary(&self, op: BinaryOp, other: &Self) -> Self {
        let truth = |holds: bool| f64::from(u8::from(holds));
        let function = move |a: f64, b: f64| match op {
            BinaryOp::Add => a + b,
            BinaryOp::Sub => a - b,
            BinaryOp::Mul => a * b,
            BinaryOp::Div => a / b,
            BinaryOp::Max | BinaryOp::Min if a.is_nan() || b.is_nan() => f64::NAN,
            BinaryOp::Max => a.max(b),
            BinaryOp::Min => a.min(b),
            BinaryOp::Greater => truth(a > b),
            BinaryOp::GreaterEqual => truth(a >= b),
            BinaryOp::Equal => truth(a == b),
        };
        only(compute(&[self.clone(), other.clone()], 1, move |a| vec![function(a[0], a[1])]))
    }

    /// `yes` where `self` is not 0, else `no`.
    pub fn select(&self, yes: &Self, no: &Self) -> Self {
        let arguments = [self.clone(), yes.clone(), no.clone()];
        only(compute(&arguments, 1, |a| vec![if a[0] == 0.0 { a[2] } else { a[1] }]))
    }
}

fn only(results: Vec<Scalar>) -> Scalar {
    results.into_iter().next().expect("a computation with one result")
}

impl Value {
    /// The vote of [`Value::elect`], by weights that may be numbers about the tensor.
    pub fn vote(terms: Vec<(Scalar, Self)>, average: bool) -> Self {
        let known: Option<Vec<f64>> =
            terms.iter().map(|(weight, _)| weight.as_constant()).collect();
        if let Some(weights) = known {
            let values = terms.into_iter().map(|(_, value)| value);
            return Self::elect(weights.into_iter().zip(values), average);
        }
        let number = |value: f64| Self::scalar(value);
        let parts: Vec<Self> =
            terms.iter().map(|(weight, value)| value * &Self::scalar(weight.clone())).collect();
        let sum = Self::weighted_sum(parts.iter().map(|part| (1.0, part.clone())));
        let agrees = Self::agreeing(&sum, &parts);
        let kept = parts.iter().zip(&agrees).map(|(part, agrees)| (1.0, part.masked(agrees)));
        let total = Self::weighted_sum(kept);
        if !average {
            return total;
        }
        let (weights, magnitudes): (Vec<_>, Vec<_>) = terms
            .into_iter()
            .map(|(weight, _)| (weight.clone(), weight.unary(UnaryOp::Abs)))
            .unzip();
        let divisor = Self::weighted_sum(weights.into_iter().zip(agrees.iter().cloned()));
        let magnitudes = Self::weighted_sum(magnitudes.into_iter().zip(agrees));
        // As of constant weights: nothing is divided by a sum that is zero but for rounding.
        let cancels = (&magnitudes * &number(CANCELLED)).at_least(&divisor.abs());
        &total / &cancels.select(&number(1.0), &divisor)
    }

    /// 1 where a part has the sign of `sum`, zero counting as positive, else 0.
    pub fn agreeing(sum: &Self, parts: &[Self]) -> Vec<Self> {
        let number = |value: f64| Self::scalar(value);
        let elected = sum.at_least(&number(0.0)).select(&number(1.0), &number(-1.0));
        parts.iter().map(|part| part.sign().binary(BinaryOp::Equal, &elected)).collect()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that fails may panic")]
mod tests {
    use super::*;

    fn formula(nodes: &str) -> Result<Value> {
        read(&Formula { nodes: nodes.into(), functions: Vec::new(), arrays: None }, 1)
    }

    fn message(nodes: &str) -> String {
        formula(nodes).unwrap_err().to_string()
    }

    #[test]
    fn a_list_becomes_the_formula() {
        let nodes = r#"[{"op": "input", "index": 0},
            {"op": "reduce", "name": "dot", "left": 0, "right": 0, "over": "tensor"},
            {"op": "scalar_unary", "name": "sqrt", "of": 1},
            {"op": "weighted_sum", "terms": [[2, 0]]}]"#;
        let value = formula(nodes).unwrap();
        assert_eq!(format!("{value:?}"), "{f0([Dot[Tensor](x0, x0)]): x0}");
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        assert!(message("[]").contains("no value"));
        assert!(message(r#"[{"op": "input", "index": 1}]"#).contains("input 1"));
        assert!(message(r#"[{"op": "spread", "of": 0}]"#).contains("node 0"));
        assert!(message(r#"[{"op": "spread", "of": 7}]"#).contains("node 7"));
        assert!(message(r#"[{"op": "what"}]"#).contains("cannot be read"));
        let calls = r#"[{"op": "compute", "function": 0, "arguments": [], "results": 1}]"#;
        assert!(message(calls).contains("function"));
    }

    /// A sum, over `inner`, of input 0 times a sum over `outer` of it; or a count of it.
    fn nested(inner: &str, outer: &str) -> String {
        format!(
            r#"[{{"op": "input", "index": 0}},
            {{"op": "reduce", "name": "sum", "left": 0, "right": null, "over": "{inner}"}},
            {{"op": "weighted_sum", "terms": [[1, 0]]}},
            {{"op": "reduce", "name": "sum", "left": 2, "right": null, "over": "{outer}"}},
            {{"op": "weighted_sum", "terms": [[3, 0]]}}]"#
        )
    }

    #[test]
    fn what_no_pass_can_give_is_an_error() {
        for inner in ["model", "tensor", "row", "column"] {
            for outer in ["tensor", "row", "column"] {
                assert!(formula(&nested(inner, outer)).is_ok(), "{inner}, {outer}");
            }
            let over_the_model = formula(&nested(inner, "model"));
            assert_eq!(over_the_model.is_ok(), inner == "row", "{inner}");
        }
        let product = |left, right| {
            let sum = |over| {
                format!(
                    r#"{{"op": "reduce", "name": "sum", "left": 0, "right": null, "over": "{over}"}}"#
                )
            };
            let product = r#"{"op": "scalar_binary", "name": "mul", "left": 1, "right": 2}"#;
            let count = r#"{"op": "largest", "of": 0, "count": 3}"#;
            let input = r#"{"op": "input", "index": 0}"#;
            format!("[{input}, {}, {}, {product}, {count}]", sum(left), sum(right))
        };
        assert!(message(&product("row", "column")).contains("of a row and of a column"));
        assert!(message(&product("row", "tensor")).contains("one number for the whole tensor"));
        assert!(formula(&product("tensor", "model")).is_ok());
    }

    #[test]
    fn what_is_nested_too_deep_is_an_error() {
        let nested = |depth: usize| {
            let negations = (0..depth - 1)
                .map(|of| format!(r#", {{"op": "unary", "name": "neg", "of": {of}}}"#));
            format!(r#"[{{"op": "input", "index": 0}}{}]"#, negations.collect::<String>())
        };
        assert!(formula(&nested(DEEPEST)).is_ok());
        assert!(message(&nested(DEEPEST + 1)).contains("nested too deep"));
    }

    #[test]
    fn numbers_are_added_in_f64() {
        let (a, b) = (Scalar::constant(0.1), Scalar::constant(0.2));
        assert_eq!(a.binary(BinaryOp::Add, &b).as_constant(), Some(0.1 + 0.2));
        assert_eq!(a.unary(UnaryOp::Neg).as_constant(), Some(-0.1));
        assert_eq!(a.select(&b, &a).as_constant(), Some(0.2));
    }
}
