//! Selections against a stable sort.

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::formula::{Scope, Value};
use proptest::prelude::*;

use super::{ArraySource, check, inputs, run_in_least_memory, settings, try_merged, weights};

fn kept(input: usize, count: u64) -> Value {
    let value = Value::input(input).abs();
    value.largest(count as f64)
}

fn check_counts(values: &[f32]) {
    let elements = values.len() as u64;
    let inputs = [ArraySource::new(values, DType::F32)];
    for count in [0, 1, 2, elements / 3, elements / 2, elements - 1, elements] {
        check::<f32>(&kept(0, count), &[elements], &inputs, DType::F32);
    }
}

#[test]
fn all_equal_and_all_zero() {
    check_counts(&vec![0.0; 200_001]);
    check_counts(&vec![-2.5; 200_001]);
    check_counts(&[1.0, -1.0, 1.0]);
}

#[test]
fn all_different() {
    check_counts(&(0..300_000_u64).map(|at| (at * 7919 % 300_000) as f32).collect::<Vec<_>>());
}

#[test]
fn infinities_and_nan_rank_highest() {
    let mut values: Vec<f32> = (0..100_000).map(|at| at as f32).collect();
    values[70_000] = f32::NAN;
    values[80_000] = f32::NEG_INFINITY;
    values[90_000] = -f32::NAN;
    check_counts(&values);
}

/// The key of NaN is near the end of the numbers, and a guess from a sample ends with it.
#[test]
fn a_nan_of_f64_ranks_highest() {
    let mut values = weights(300_000, 1);
    values[0] = f64::NAN;
    let inputs = [ArraySource::new(&values, DType::F64)];
    for count in [1, 2, 150_000] {
        check::<f64>(&kept(0, count), &[300_000], &inputs, DType::F64);
    }
}

/// Differences of bf16 weights: a third zero, many ties, also across the edges of blocks.
#[test]
fn realistic_differences_with_three_densities() {
    let elements = 5 * 65_536 + 123;
    let base = weights(elements, 1);
    let near = |seed: u64| -> Vec<f64> {
        base.iter().zip(weights(elements, seed)).map(|(b, n)| b + n / 512.0).collect()
    };
    let models: Vec<Arc<ArraySource>> = [&base, &near(2), &near(3), &near(4)]
        .iter()
        .map(|values| ArraySource::new::<f64>(values, DType::Bf16))
        .collect();
    let vector = |at: usize| &Value::input(at) - &Value::input(0);
    let sum = [0.1, 0.5, 0.93].iter().enumerate().map(|(at, density)| {
        let vector = vector(at + 1);
        let count = (density * elements as f64).trunc();
        (0.25 * (at + 1) as f64, vector.masked(&vector.abs().largest(count)))
    });
    let formula = &Value::input(0) + &Value::weighted_sum(sum);
    check::<f32>(&formula, &[elements], &models, DType::F32);
}

/// How far models are from their base, and how many values differ, does not change the time: one
/// pass finds all thresholds, and one more merges what it could not merge.
#[test]
fn one_pass_finds_the_thresholds_of_all_inputs() {
    let elements = 1_500_000;
    let smooth = |seed: u64, scale: f64| -> Vec<f64> {
        let bell = |at: u64| {
            let uniform = |salt: u64| {
                let mixed = (at * 4 + salt + seed * 4_000_037).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                ((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 11) as f64
            };
            (0..4).map(uniform).sum::<f64>() / (1_u64 << 53) as f64 - 2.0
        };
        // Rows are not alike.
        (0..elements).map(|at| scale * (1.0 + (at / 5000 % 7) as f64) * bell(at)).collect()
    };
    let base = smooth(1, 0.02);
    for (step, dtype) in
        [1e-4, 0.002].iter().flat_map(|step| [(step, DType::Bf16), (step, DType::F32)])
    {
        let near = |seed: u64| -> Vec<f64> {
            base.iter().zip(smooth(seed, *step)).map(|(base, step)| base + step).collect()
        };
        let models: Vec<Arc<ArraySource>> = [&base, &near(2), &near(3)]
            .iter()
            .map(|values| ArraySource::new::<f64>(values, dtype))
            .collect();
        let vector = |at: usize| &Value::input(at) - &Value::input(0);
        for density in [0.1, 0.5, 0.8] {
            let kept = |at: usize| {
                let vector = vector(at);
                (0.5, vector.masked(&vector.abs().largest((density * elements as f64).trunc())))
            };
            let formula = &Value::input(0) + &Value::weighted_sum([kept(1), kept(2)]);
            let settings = &settings()[0];
            let (_, report) = try_merged(&formula, &[elements], &models, dtype, settings).unwrap();
            let once = 3 * elements * dtype.size() as u64;
            let passes = report.bytes_read as f64 / once as f64;
            assert!(
                passes < 2.2,
                "{passes} passes over {dtype} at {density}, differences of {step}"
            );
        }
    }
}

/// A tensor without room for kept keys takes more passes and gives the same.
#[test]
fn without_room_for_keys_bins_are_counted() {
    let elements = 2_000_000;
    let values: Vec<f32> = (0..elements).map(|at| (at * 7919 % elements) as f32).collect();
    let inputs = [ArraySource::new(&values, DType::F32)];
    let run =
        |settings: &_| try_merged(&kept(0, 777_777), &[elements], &inputs, DType::F32, settings);
    let (kept, report) = run(&settings()[0]).unwrap();
    let (counted, in_least) = run_in_least_memory(run);
    assert!(report.bytes_read < in_least.bytes_read, "{report:?} {in_least:?}");
    assert!(kept == counted, "bytes differ");
}

#[test]
fn an_order_statistic_is_a_value_of_the_tensor() {
    let inputs = inputs(1, 150_000, DType::F32);
    let value = Value::input(0);
    for count in [1.0, 75_000.0, 150_000.0] {
        let threshold = Value::scalar(value.order_statistic(count));
        check::<f32>(&(&value - &threshold), &[150_000], &inputs, DType::F32);
    }
}

#[test]
fn a_sum_may_need_a_selection_and_the_other_way_round() {
    let inputs = inputs(1, 150_000, DType::Bf16);
    let value = Value::input(0);
    let thinned = value.masked(&value.abs().largest(70_000.0));
    let l1 = thinned.absolute_sum(Scope::Tensor);
    let count = oxmerge::formula::compute(&[l1], 1, |l1| vec![(l1[0] % 1000.0).trunc() + 1.0]);
    let again = value.masked(&value.largest(count[0].clone()));
    check::<f32>(&(&thinned + &again), &[150_000], &inputs, DType::F32);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Few distinct values, so that ties lie anywhere.
    #[test]
    fn any_values_and_any_count(
        values in prop::collection::vec(prop_oneof![-4_i8..4, -127_i8..127], 1..3000),
        repeats in 1_usize..90,
        share in 0.0_f64..1.0,
    ) {
        let values: Vec<f32> =
            values.iter().cycle().take(values.len() * repeats).map(|&v| f32::from(v)).collect();
        let count = (share * values.len() as f64) as u64 + 1;
        let inputs = [ArraySource::new(&values, DType::Bf16)];
        check::<f32>(&kept(0, count), &[values.len() as u64], &inputs, DType::Bf16);
    }
}
