//! Rankings within rows, groups and vectors along other dimensions against a stable sort.

use oxmerge::dtype::DType;
use oxmerge::error::ErrorKind;
use oxmerge::formula::{Among, Pick, Scope, Value, compute};
use oxmerge::kernels::Real;
use proptest::prelude::*;

use super::{ArraySource, check, inputs, settings, try_merged, weights};

const RANDOM: Pick = Pick::Random { lowest: 0.2, highest: 0.9, stream: 1 };

fn picked(input: usize, among: Among, pick: Pick) -> Value {
    Value::input(input).abs().picked_by_rank(among, pick)
}

fn check_picks<T: Real>(shape: &[u64], among: Among, values: &[f64], dtype: DType) {
    let inputs = [ArraySource::new(values, dtype)];
    for pick in [Pick::Largest(0), Pick::Largest(2), Pick::Largest(30_000), RANDOM] {
        check::<T>(&picked(0, among, pick), shape, &inputs, dtype);
    }
}

#[test]
fn rows_short_and_long() {
    for shape in [
        [1, 1],
        [1, 7],
        [7, 1],
        [3001, 41],
        [60, 4096],
        [17, 10_007],
        [3, 65_536],
        [3, 65_537],
        [2, 150_001],
    ] {
        let values = weights(shape[0] * shape[1], shape[1]);
        check_picks::<f32>(&shape, Among::Row, &values, DType::Bf16);
    }
    check_picks::<f64>(&[50, 3001], Among::Row, &weights(150_050, 3), DType::F64);
    check_picks::<f64>(&[2, 70_001], Among::Row, &weights(140_002, 4), DType::F64);
    check_picks::<f32>(&[], Among::Row, &[3.0], DType::F32);
}

/// Rows that are gone through several times, a part of the largest at a time: also of equal ones.
#[test]
fn rows_longer_than_what_is_held_at_once() {
    let elements = 700_001;
    check_picks::<f32>(&[elements], Among::Row, &weights(elements, 9), DType::Bf16);
    check_picks::<f64>(&[elements], Among::Row, &weights(elements, 9), DType::F64);
    let inputs = [ArraySource::new(&vec![0.5_f32; 700_001], DType::F32)];
    for pick in [Pick::Largest(500_000), RANDOM] {
        check::<f32>(&picked(0, Among::Row, pick), &[elements], &inputs, DType::F32);
    }
}

#[test]
fn groups_begin_anew_in_each_row() {
    for (shape, group) in [
        ([400, 301], 4),
        ([400, 301], 7),
        ([2, 150_001], 256),
        ([2, 150_001], 70_000),
        ([9, 8], 99),
    ] {
        let values = weights(shape[0] * shape[1], group);
        check_picks::<f32>(&shape, Among::Group(group), &values, DType::F32);
    }
}

/// Short slabs, long ones, long ones that are ranked in several bands, and a last one cut short.
#[test]
fn vectors_along_an_inner_dimension() {
    for (shape, length, stride) in [
        (vec![300, 40, 9], 40, 9),
        (vec![300, 40, 1], 40, 1),
        (vec![300, 1, 40], 1, 40),
        (vec![20, 3, 14, 14], 3, 196),
        (vec![3, 500, 200], 500, 200),
        (vec![2, 3000, 150], 3000, 150),
        (vec![1, 300_000, 2], 300_000, 2),
        (vec![7, 1000], 600, 3),
    ] {
        let values = weights(shape.iter().product(), length);
        check_picks::<f32>(&shape, Among::Vector { length, stride }, &values, DType::Bf16);
    }
}

#[test]
fn equal_elements_and_nan_have_an_order() {
    for row in [2000, 100_000] {
        let shape = [200_000 / row, row];
        check_picks::<f32>(&shape, Among::Row, &vec![0.0; 200_000], DType::F32);
        check_picks::<f32>(&shape, Among::Row, &vec![-2.5; 200_000], DType::F32);
        let mut values = weights(200_000, 8);
        (values[7], values[70_000], values[199_999]) = (f64::NAN, f64::NEG_INFINITY, -f64::NAN);
        check_picks::<f32>(&shape, Among::Row, &values, DType::F32);
        check_picks::<f64>(&shape, Among::Row, &values, DType::F64);
    }
}

/// As DELLA has it: the norms of what is kept, over the tensor, and a vote.
#[test]
fn a_sum_over_the_tensor_may_need_ranks() {
    for shape in [[40, 3000], [1, 120_000], [2, 66_000]] {
        let inputs = inputs(3, shape[0] * shape[1], DType::Bf16);
        let base = Value::input(0);
        let part = |at: usize| {
            let vector = &Value::input(at) - &base;
            let pick = Pick::Random { lowest: 0.3, highest: 0.6, stream: at as u32 };
            let kept = vector.masked(&vector.abs().picked_by_rank(Among::Row, pick));
            let sums = [vector.absolute_sum(Scope::Tensor), kept.absolute_sum(Scope::Tensor)];
            let ratio = compute(&sums, 1, |sums| vec![sums[0] / sums[1]]);
            (0.5, kept.scaled(ratio[0].clone()))
        };
        let formula = &base + &Value::elect([part(1), part(2)], true);
        check::<f32>(&formula, &shape, &inputs, DType::Bf16);
    }
}

/// As CABS has it: who chooses later depends on who chose before. Then numbers about rows and the
/// tensor, in between and after.
#[test]
fn ranks_may_need_ranks_and_numbers() {
    for shape in [[40, 3000], [1, 120_000], [2, 66_000]] {
        let inputs = inputs(2, shape[0] * shape[1], DType::F32);
        let (a, b, zero) = (Value::input(0), Value::input(1), Value::scalar(0.0));
        let first = a.masked(&a.abs().picked_by_rank(Among::Group(16), Pick::Largest(5)));
        let free = first.select(&zero, &b);
        let second = free.masked(&free.abs().picked_by_rank(Among::Row, RANDOM));
        let scaled = &second - &Value::scalar(second.max(Scope::Row));
        let third = scaled.picked_by_rank(Among::Row, Pick::Largest(700));
        let whole = third.dot(&second, Scope::Tensor);
        let fourth = (&second * &Value::scalar(whole)).picked_by_rank(Among::Group(8), RANDOM);
        let formula = Value::weighted_sum([(1.0, first), (0.5, third), (0.25, fourth)]);
        check::<f32>(&formula, &shape, &inputs, DType::F32);
    }
}

/// Groups of which none divides the other do not begin anew together, but where rows do.
#[test]
fn groups_of_several_sizes_are_ranked_together() {
    for shape in [[50, 5120], [300, 274], [900, 192], [12, 14_336]] {
        let inputs = inputs(3, shape[0] * shape[1], DType::F32);
        let group = |input: usize, size: u64, count: u64| {
            let a = Value::input(input);
            a.masked(&a.abs().picked_by_rank(Among::Group(size), Pick::Largest(count)))
        };
        let parts = [(1.0, group(0, 48, 7)), (0.5, group(1, 64, 9)), (0.25, group(2, 36, 5))];
        check::<f32>(&Value::weighted_sum(parts), &shape, &inputs, DType::F32);
    }
}

#[test]
fn columns_and_selections_may_need_ranks() {
    let inputs = inputs(1, 120_000, DType::F32);
    for shape in [[40, 3000], [1, 120_000]] {
        let a = Value::input(0);
        let kept = a.masked(&picked(0, Among::Row, Pick::Largest(900)));
        let columns = &kept - &Value::scalar(kept.sum(Scope::Column));
        let largest = kept.masked(&kept.abs().largest(300.0));
        check::<f32>(&(&columns + &largest), &shape, &inputs, DType::F32);
    }
}

/// The one ranking that is made of equal parts.
#[test]
fn equal_random_probabilities_are_a_random_mask() {
    let inputs = inputs(1, 90_000, DType::F32);
    let even = Pick::Random { lowest: 0.37, highest: 0.37, stream: 4 };
    let shape = [30, 3000];
    let run = |formula: &Value| {
        try_merged(formula, &shape, &inputs, DType::F32, &settings()[0]).unwrap().0
    };
    assert_eq!(run(&picked(0, Among::Row, even)), run(&Value::random_mask(0.37, 4)));
}

/// Long rows are ranked once, however many passes need them.
#[test]
fn a_long_row_is_ranked_once() {
    let elements = 200_000;
    let inputs = inputs(1, elements, DType::F32);
    let a = Value::input(0);
    let kept = a.masked(&picked(0, Among::Row, RANDOM));
    let formula = kept.scaled(kept.absolute_sum(Scope::Tensor));
    let settings = &settings()[0];
    let (_, report) = try_merged(&formula, &[elements], &inputs, DType::F32, settings).unwrap();
    assert_eq!(report.bytes_read, 3 * 4 * elements);
}

#[test]
fn a_number_over_the_model_needs_no_rank() {
    let inputs = inputs(1, 3000, DType::F32);
    let sum = picked(0, Among::Row, RANDOM).sum(Scope::Model);
    let formula = Value::input(0).scaled(sum);
    let run = try_merged(&formula, &[30, 100], &inputs, DType::F32, &settings()[0]);
    assert_eq!(run.unwrap_err().kind(), ErrorKind::Plan);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Few distinct values, so that ties lie anywhere.
    #[test]
    fn any_values_and_any_rows(
        values in prop::collection::vec(prop_oneof![-4_i8..4, -127_i8..127], 1..3000),
        repeats in 1_u64..90,
        group in 1_u64..4000,
        count in 0_u64..100,
        is_random: bool,
    ) {
        let rows = [repeats, values.len() as u64];
        let values: Vec<f32> =
            values.iter().cycle().take(values.len() * repeats as usize).map(|&v| v.into()).collect();
        let inputs = [ArraySource::new(&values, DType::Bf16)];
        let pick = if is_random { RANDOM } else { Pick::Largest(count) };
        check::<f32>(&picked(0, Among::Group(group), pick), &rows, &inputs, DType::Bf16);
    }
}
