//! A method that is not in the release, written as a newcomer would write it; and what tests of the
//! engine need of those that are.

mod norm_average;

use oxmerge::dtype::DType;
use oxmerge::error::Result;
use oxmerge::formula::Value;
use oxmerge::formula::oracle::Oracle;
use oxmerge::methods::{self, Input, Inputs, Method};
use oxmerge::plan::{OutputTensor, SourceTensor};
use serde_json::{Value as Json, json};

use crate::engine::{check, inputs};

/// A tensor of inputs with these weights.
fn tensor_of(shape: &[u64], weights: &[f64]) -> OutputTensor {
    let source = |weight: &f64| SourceTensor {
        model: "m".to_owned(),
        name: "t".to_owned(),
        dtype: DType::F32,
        file: 0,
        start: 0,
        parameters: json!({ "weight": weight }).as_object().unwrap().clone(),
    };
    OutputTensor {
        name: "t".to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        shard: 0,
        start: 0,
        sources: weights.iter().map(source).collect(),
        base: None,
        parameters: serde_json::Map::new(),
        formula: None,
    }
}

/// The formula of a released method without parameters but `shared`, for a base and `others` models.
pub(crate) fn released(name: &str, shape: &[u64], others: usize, shared: &Json) -> Value {
    let mut tensor = tensor_of(shape, &vec![1.0; others + 1]);
    tensor.base = Some(0);
    tensor.parameters.clone_from(shared.as_object().unwrap());
    methods::find(name).unwrap().formula(&tensor).unwrap()
}

/// The norm-preserving average by these weights.
fn norm_average(shape: &[u64], weights: &[f64]) -> Value {
    norm_average::NormAverage.formula(&tensor_of(shape, weights)).unwrap()
}

/// Masks are drawn by the position among the others, however the inputs are listed.
#[test]
fn positions_leave_the_base_out() {
    let mut tensor = tensor_of(&[4], &[1.0; 4]);
    let positions = |inputs: Vec<Input<'_>>| -> Vec<u32> {
        inputs.iter().map(|input| input.position).collect()
    };
    assert_eq!(positions(Inputs::of(&tensor).all()), [0, 1, 2, 3]);
    tensor.base = Some(1);
    assert_eq!(positions(Inputs::of(&tensor).others()), [0, 1, 2]);
    assert_eq!(positions(Inputs::of(&tensor).all()), [0, 1, 1, 2]);
}

#[test]
fn the_norm_is_preserved() {
    let evaluate = |inputs: Vec<Vec<f32>>, weights: &[f64]| {
        Oracle::new("t", 0, &[2], inputs).evaluate(&norm_average(&[2], weights))
    };
    // Average (2, 1.5) of length 2.5; the inputs have lengths 4 and 3, so the scale is 3.5 / 2.5.
    let orthogonal = vec![vec![4.0, 0.0], vec![0.0, 3.0]];
    assert_eq!(evaluate(orthogonal.clone(), &[1.0, 1.0]), [2.0 * 1.4, 1.5 * 1.4]);
    // A weight of zero leaves the other as it is.
    assert_eq!(evaluate(orthogonal, &[0.0, 5.0]), [0.0, 3.0]);
    // What cancels out has no direction.
    assert_eq!(evaluate(vec![vec![1.0, -2.0], vec![-1.0, 2.0]], &[1.0, 1.0]), [0.0, 0.0]);
}

#[test]
fn norm_average_is_the_same_everywhere() {
    for shape in [&[300_u64, 501][..], &[131_073], &[1]] {
        let inputs = inputs(3, shape.iter().product(), DType::Bf16);
        check::<f32>(&norm_average(shape, &[0.2, 0.5, 0.3]), shape, &inputs, DType::Bf16);
    }
}

/// The same with what the method adds to the base scaled.
fn scaled(name: &str, shape: &[u64], others: usize, scale: f64) -> Result<Value> {
    let mut tensor = tensor_of(shape, &vec![1.0; others + 1]);
    tensor.base = Some(0);
    tensor.parameters.clone_from(shared(scale).as_object().unwrap());
    methods::scaled(&tensor, methods::find(name).unwrap().formula(&tensor)?)
}

/// What some methods are told; the others take no notice.
fn shared(scale: f64) -> Json {
    json!({
        "select_topk": 0.5, "filter_wise": true, "t": 0.01, "lambda": 0.25, "layer_scale": scale,
    })
}

#[test]
fn what_is_added_to_the_base_is_scaled() {
    let inputs = vec![vec![1.0_f32, -2.0, 0.5], vec![1.5, -2.25, 4.0]];
    let evaluate = |formula: &Value| Oracle::new("t", 0, &[3], inputs.clone()).evaluate(formula);
    for name in ["slerp", "nearswap"] {
        let merged = evaluate(&released(name, &[3], 1, &shared(1.0)));
        let pairs = inputs[0].iter().zip(&merged);
        let expected: Vec<f32> = pairs.map(|(base, x)| base + 0.25 * (x - base)).collect();
        assert_eq!(evaluate(&scaled(name, &[3], 1, 0.25).unwrap()), expected, "{name}");
    }
}

/// A quarter of the step at 1000 is lost when it is added, but not when it is scaled first.
#[test]
fn what_a_method_adds_is_not_rounded_before() {
    let step = 2.0_f32.powi(-14);
    let inputs = vec![vec![1000.0_f32], vec![1000.0 + step]];
    let evaluate = |scale: f64| {
        Oracle::new("t", 0, &[1], inputs.clone())
            .evaluate(&scaled("magmax", &[1], 1, scale).unwrap())
    };
    assert_eq!(evaluate(1.0), inputs[0]);
    assert_eq!(evaluate(4.0), inputs[1]);
}

#[test]
fn a_scale_of_one_changes_nothing_and_one_of_zero_is_the_base() {
    for (name, others) in [("sce", 2), ("model_stock", 2), ("slerp", 1), ("arcee_fusion", 1)] {
        let plain = released(name, &[3, 5], others, &shared(1.0));
        let one = scaled(name, &[3, 5], others, 1.0).unwrap();
        assert_eq!(format!("{one:?}"), format!("{plain:?}"));
        assert_eq!(format!("{:?}", scaled(name, &[3, 5], others, 0.0).unwrap()), "x0");
    }
}

#[test]
fn a_scale_needs_a_base() {
    let mut tensor = tensor_of(&[2], &[1.0]);
    tensor.parameters.clone_from(shared(0.5).as_object().unwrap());
    let error = methods::scaled(&tensor, Value::input(0)).unwrap_err().to_string();
    assert!(error.contains("and there is none"), "{error}");
}

#[test]
fn scaled_methods_are_the_same_everywhere() {
    for shape in [&[300_u64, 501][..], &[1]] {
        for (name, others) in [("sce", 2), ("model_stock", 2), ("slerp", 1), ("arcee_fusion", 1)] {
            let inputs = inputs(others as u64 + 1, shape.iter().product(), DType::Bf16);
            let formula = scaled(name, shape, others, 0.3).unwrap();
            check::<f32>(&formula, shape, &inputs, DType::Bf16);
        }
    }
}

#[test]
fn the_document_shows_this_method() {
    let document = include_str!("../../../rust/methods/ADDING.md");
    let shown = document.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(shown, Some(include_str!("norm_average.rs")));
}
