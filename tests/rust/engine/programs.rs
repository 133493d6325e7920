//! What each method is compiled to, alone and in a sweep: what is fused, and what is not.

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::listing;
use oxmerge::engine::source::{Nowhere, Sink};
use oxmerge::engine::task::{Task, Work};
use oxmerge::formula::Value;
use oxmerge::kernels::Level;
use oxmerge::methods;
use oxmerge::methods::measures::difference;
use oxmerge::plan::{OutputTensor, SourceTensor};
use serde_json::{Value as Json, json};

use super::{inputs, sources};

const SHAPE: [u64; 2] = [300, 501];

/// The formula of a method; the first of `inputs` inputs is the base.
fn formula(method: &str, count: usize, each: &Json, shared: &Json) -> Value {
    let parameters = |json: &Json| json.as_object().unwrap().clone();
    let source = |_| SourceTensor {
        model: "m".to_owned(),
        name: "t".to_owned(),
        dtype: DType::Bf16,
        file: 0,
        start: 0,
        parameters: parameters(each),
    };
    let tensor = OutputTensor {
        name: "t".to_owned(),
        shape: SHAPE.to_vec(),
        dtype: DType::Bf16,
        shard: 0,
        start: 0,
        sources: (0..count).map(source).collect(),
        base: Some(0),
        parameters: parameters(shared),
        formula: None,
    };
    methods::find(method).unwrap().formula(&tensor).unwrap()
}

/// The programs of formulas over `count` inputs, made in one go. Numbers with a fraction are left
/// out: they are of the values.
fn listed(formulas: &[Value], count: u64) -> String {
    let inputs = inputs(count, SHAPE.iter().product(), DType::Bf16);
    let sink = |_: &Value| -> Arc<dyn Sink> { Arc::new(Nowhere(DType::Bf16)) };
    let task = Task::new(
        "t",
        17,
        &SHAPE,
        sources(&inputs),
        vec!["m".to_owned(); inputs.len()],
        formulas.iter().map(sink).collect(),
        Work::Formulas(formulas.to_vec()),
    );
    let text = listing::programs(task, Level::portable()).unwrap();
    let word = |word: &str| {
        let number = word.trim_matches(['(', ')', ',']);
        let is_fraction = number.contains('.') && number.parse::<f64>().is_ok();
        if is_fraction { word.replace(number, "#") } else { word.to_owned() }
    };
    let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn family(method: &str, density: f64) -> Value {
    let shared = json!({ "normalize": method == "ties", "rescale": method.starts_with("dare"),
        "lambda": 1.0 });
    formula(method, 3, &json!({ "weight": 0.5, "density": density }), &shared)
}

#[track_caller]
fn assert_listed(formulas: &[Value], count: u64, expected: &str) {
    let found = listed(formulas, count);
    assert_eq!(found, expected.trim_end(), "\n{found}\n");
}

#[test]
fn copies_and_weighted_sums() {
    assert_listed(&[Value::input(1)], 2, "combine\n  copy o0 x1");
    let linear = formula("linear", 2, &json!({ "weight": 0.5 }), &json!({ "normalize": true }));
    assert_listed(&[linear], 2, "combine\n  fused store o0 BF16 # x0 + # x1");
    assert_listed(
        &[family("task_arithmetic", 1.0)],
        3,
        "combine\n  fused store o0 BF16 x0 + 1 (# x1 + # x2) from it",
    );
}

#[test]
fn slerp_reduces_from_bytes() {
    let slerp = formula("slerp", 2, &json!({}), &json!({ "t": 0.4 }));
    assert_listed(
        &[slerp],
        2,
        "reduce\n  fused n0, n1, n2 = products x0 x1\ncombine\n  fused store o0 BF16 # x0 + # x1",
    );
}

/// How two inputs differ takes one loop over them, and one over their bits.
#[test]
fn differences_are_found_from_bytes() {
    let inputs = inputs(2, SHAPE.iter().product(), DType::Bf16);
    let stored = std::iter::once(Value::differing(0, 1));
    let numbers = stored.chain(difference(false, Some(SHAPE.iter().product()))).collect();
    let work = Work::numbers(numbers);
    let labels = vec!["m".to_owned(); inputs.len()];
    let sink: Arc<dyn Sink> = Arc::new(Nowhere(DType::Bf16));
    let task = Task::new("t", 17, &SHAPE, sources(&inputs), labels, vec![sink], work);
    let found = listing::programs(task, Level::portable()).unwrap();
    let lines: Vec<_> = found.lines().collect();
    let is_fused = |line: &&str| line.ends_with(" = differences x1 - x0");
    assert!(lines.len() == 3 && lines.iter().any(is_fused), "{found}");
}

const DARE_TIES: &str = "\
reduce
  fused n0, n1 = norms x1 - x0, m0 of it
  fused n2, n3 = norms x2 - x0, m1 of it
combine
  fused store o0 BF16 x0 + 1 Elect (# # m0 of x1, # # m1 of x2)";

#[test]
fn dare_is_fused_alone_and_in_a_sweep() {
    assert_listed(&[family("dare_ties", 0.5)], 3, DARE_TIES);
    let expected = DARE_TIES.replace("Elect", "None");
    assert_listed(&[family("dare_linear", 0.5)], 3, &expected);
    // Each density has masks of its own; the norms of the whole are computed once.
    assert_listed(
        &[family("dare_ties", 0.5), family("dare_ties", 0.3)],
        3,
        "\
reduce
  fused n0, n1 = norms x1 - x0, m0 of it
  fused n2, n3 = norms x2 - x0, m1 of it
  fused n4 = norms x1 - x0, m0 of it
  fused n5 = norms x2 - x0, m1 of it
combine
  fused store o0 BF16 x0 + 1 Elect (# # m0 of x1, # # m1 of x2)
  fused store o1 BF16 x0 + 1 Elect (# # m0 of x1, # # m1 of x2)",
    );
}

/// What was ranked is a mask like one that was drawn.
#[test]
fn della_merges_by_the_kernels_of_dare() {
    let each = json!({ "weight": 0.5, "density": 0.5, "epsilon": 0.1 });
    let shared = json!({ "normalize": false, "rescale": true, "lambda": 1.0 });
    let found = listed(&[formula("della", 3, &each, &shared)], 3);
    let expected = DARE_TIES.replace("m0 of", "r0 of").replace("m1 of", "r1 of");
    for line in expected.lines().filter(|line| line.starts_with(' ')) {
        assert!(found.contains(line), "{found}");
    }
    assert!(found.contains("first") && !found.contains("mask r"), "{found}");
}

/// One pass counts for both inputs, and merges what it can; one more merges the rest.
#[test]
fn ties_counts_and_merges_from_bytes() {
    let found = listed(&[family("ties", 0.5), family("ties", 0.3)], 3);
    let passes: Vec<_> = found.lines().filter(|line| !line.starts_with(' ')).collect();
    let is_expected = passes.first() == Some(&"sample")
        && passes.iter().filter(|pass| pass.starts_with("reduce")).count() == 1
        && passes.last() == Some(&"combine");
    assert!(is_expected, "{found}");
    let expected = "\
reduce ahead
  fused count, store o2 BOOL between cuts of q0 |x1 - x0|, q1 |x2 - x0|, q2 |x1 - x0|, q3 |x2 - x0|
  fused store o0 BF16 x0 + 1 Average (# 1 the largest of x1, # 1 the largest of x2)
  fused store o1 BF16 x0 + 1 Average (# 1 the largest of x1, # 1 the largest of x2)
";
    assert!(found.contains(expected), "{found}");
    let expected = "\
combine
  fused store o0 BF16 x0 + 1 Average (# 1 the largest of x1, # 1 the largest of x2)
  fused store o1 BF16 x0 + 1 Average (# 1 the largest of x1, # 1 the largest of x2)";
    assert!(found.ends_with(expected), "{found}");
}

/// What has no kernel of its own keeps what has one from nothing.
#[test]
fn a_match_does_not_depend_on_what_else_is_computed() {
    let other = Value::input(1).abs();
    let found = listed(&[family("dare_ties", 0.5), other], 3);
    assert!(found.starts_with(DARE_TIES.split("combine").next().unwrap()), "{found}");
    let expected = "\
combine
  s0 = x1
  s1 = Abs s0
  fused store o0 BF16 x0 + 1 Elect (# # m0 of x1, # # m1 of x2)
  store o1 BF16 s1";
    assert!(found.ends_with(expected), "{found}");
}

/// Numbers by row are reduced first, in the same pass.
#[test]
fn rows_are_reduced_in_the_step() {
    let each = json!({ "weight": 0.5 });
    let shared = json!({ "nuslerp_row_wise": false, "nuslerp_flatten": false, "normalize": true });
    let found = listed(&[formula("nuslerp", 3, &each, &shared)], 3);
    let first = "combine\n  first\n";
    assert!(found.starts_with(first) && found.contains("  n0 = Dot "), "{found}");
    assert!(found.contains("  then\n") && found.contains(" = spread v0"), "{found}");
}

/// Numbers by row that a selection needs are found once, in a pass of their own.
#[test]
fn rows_that_are_selected_by_are_reduced_once() {
    let found = listed(&[formula("arcee_fusion", 2, &json!({}), &json!({}))], 2);
    let passes: Vec<_> = found.lines().filter(|line| !line.starts_with(' ')).collect();
    assert!(passes.starts_with(&["rows", "sample"]), "{found}");
    let (rows, rest) = found.split_at(found.find("sample").unwrap());
    assert_eq!(rows.matches("  first\n").count(), 2, "{found}");
    assert!(!rest.contains("first") && rest.contains(" = spread v0"), "{found}");
}
