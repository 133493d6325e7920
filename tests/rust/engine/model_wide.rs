//! Sums over the whole model, and a method with many passes, under all settings.

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::control::Control;
use oxmerge::engine::source::Sink;
use oxmerge::engine::task::{Task, Work};
use oxmerge::engine::{Settings, run};
use oxmerge::error::Result;
use oxmerge::formula::{Scope, Value};
use serde_json::json;

use super::{
    ArraySink, ArraySource, check, inputs, run_in_least_memory, settings, sources, weights,
};
use crate::methods::released;

#[test]
fn arcee_fusion_is_the_same_everywhere() {
    for shape in [&[64_u64, 96][..], &[500, 401], &[3, 70_001], &[70_001]] {
        let elements = shape.iter().product();
        let inputs = inputs(2, elements, DType::Bf16);
        let formula = released("arcee_fusion", shape, 1, &json!({}));
        check::<f32>(&formula, shape, &inputs, DType::Bf16);
    }
}

/// A model of three tensors: base and two others.
fn model() -> Vec<Vec<Arc<ArraySource>>> {
    let sizes = [70_001_u64, 5, 131_072];
    sizes.iter().enumerate().map(|(at, &size)| tensor(size, at as u64)).collect()
}

fn tensor(elements: u64, at: u64) -> Vec<Arc<ArraySource>> {
    let base = weights(elements, 10 + at);
    let near = |seed: u64, scale: f64| -> Vec<f64> {
        base.iter().zip(weights(elements, seed + at)).map(|(b, n)| b + scale * n).collect()
    };
    let models = [base.clone(), near(20, 0.01), near(30, 0.03)];
    models.iter().map(|values| ArraySource::new::<f64>(values, DType::F32)).collect()
}

fn merge(model: &[Vec<Arc<ArraySource>>], settings: &Settings) -> Result<Vec<Vec<u8>>> {
    let formula = released("metagpt", &[1], 2, &json!({ "lambda": 1.0 }));
    let sinks: Vec<Arc<ArraySink>> =
        model.iter().map(|t| ArraySink::new(t[0].widened::<f32>().len(), DType::F32)).collect();
    let task = |(inputs, sink): (&Vec<Arc<ArraySource>>, &Arc<ArraySink>)| {
        let elements = inputs[0].widened::<f32>().len() as u64;
        let (labels, sinks) = (vec![String::new(); 3], vec![Arc::clone(sink) as Arc<dyn Sink>]);
        let work = Work::Formulas(vec![formula.clone()]);
        Task::new("t", 0, &[elements], sources(inputs), labels, sinks, work)
    };
    let tasks = model.iter().zip(&sinks).map(task).collect();
    run(tasks, settings, &Control::default())?;
    Ok(sinks.iter().map(|sink| sink.bytes()).collect())
}

#[test]
fn metagpt_weighs_by_norms_over_all_tensors() {
    let model = model();
    let merged = merge(&model, &settings()[0]).unwrap();
    let values = |t: usize, m: usize| model[t][m].widened::<f32>();
    let norm = |m: usize| -> f64 {
        let squares = |t: usize| -> f64 {
            let pairs = values(t, 0).into_iter().zip(values(t, m));
            pairs.map(|(b, x)| f64::from(x - b).powi(2)).sum()
        };
        (0..model.len()).map(squares).sum()
    };
    let share = norm(1) / (norm(1) + norm(2));
    for (t, merged) in merged.iter().enumerate() {
        let merged: &[f32] = bytemuck::cast_slice(merged);
        let all = values(t, 0).into_iter().zip(values(t, 1)).zip(values(t, 2)).zip(merged);
        for (((b, x), y), &z) in all {
            let expected =
                f64::from(b) + share * f64::from(x - b) + (1.0 - share) * f64::from(y - b);
            let error = (f64::from(z) - expected).abs();
            assert!(error <= 1e-8 + 1e-6 * expected.abs(), "{z} is not {expected}");
        }
    }
}

#[test]
fn metagpt_is_the_same_everywhere() {
    let model = model();
    let expected = merge(&model, &settings()[0]).unwrap();
    for settings in settings() {
        assert_eq!(merge(&model, &settings).unwrap(), expected, "bytes differ: {settings:?}");
    }
    assert_eq!(run_in_least_memory(|settings| merge(&model, settings)), expected);
}

#[test]
fn empty_tensors_are_finished() {
    let empty = [ArraySource::new::<f32>(&[], DType::F32)];
    let formula = &Value::input(0) + &Value::input(0);
    check::<f32>(&formula, &[0, 4], &empty, DType::F32);
}

/// A maximum over the model is not a sum, and −0 and NaN are as in any other.
#[test]
fn the_largest_of_the_model() {
    let x = Value::input(0);
    let tensors = [vec![-3.0_f32, -0.5], vec![-2.0, -7.0, -1.0], vec![-0.25]];
    let sinks: Vec<_> = tensors.iter().map(|t| ArraySink::new(t.len(), DType::F32)).collect();
    let task = |(values, sink): (&Vec<f32>, &Arc<ArraySink>)| {
        let source = ArraySource::new(values, DType::F32);
        let work = Work::Formulas(vec![&x - &Value::scalar(x.max(Scope::Model))]);
        let (labels, sinks) = (vec![String::new()], vec![Arc::clone(sink) as Arc<dyn Sink>]);
        Task::new("t", 0, &[values.len() as u64], sources(&[source]), labels, sinks, work)
    };
    let tasks = tensors.iter().zip(&sinks).map(task).collect();
    run(tasks, &settings()[0], &Control::default()).unwrap();
    for (values, sink) in tensors.iter().zip(&sinks) {
        let bytes = sink.bytes();
        let expected: Vec<f32> = values.iter().map(|value| value + 0.25).collect();
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&bytes), expected);
    }
}
