//! Formulas of every class and scope, on shapes that cut blocks and rows in odd places.

use oxmerge::dtype::DType;
use oxmerge::error::ErrorKind;
use oxmerge::formula::{BinaryOp, Scope, UnaryOp, Value, compute};

use super::{
    ArraySource, all_merged, check, inputs, merged, run_in_least_memory, settings, try_merged,
    weights,
};

/// A slerp-like combination: coefficients from inner products over `scope`.
fn gram(scope: Scope) -> Value {
    let (a, b) = (Value::input(0), Value::input(1));
    let sums = [a.dot(&a, scope), a.dot(&b, scope), b.dot(&b, scope)];
    let weights = compute(&sums, 2, |g| {
        let total = g[0] + g[2] + 1.0;
        vec![(g[0] - g[1]) / total, (g[2] + g[1]) / total]
    });
    Value::weighted_sum(weights.into_iter().zip([a, b]))
}

/// Softmax-like: two row reductions, the second of which needs the first.
fn rows_of_rows() -> Value {
    let a = Value::input(0);
    let largest = Value::scalar(a.max(Scope::Row));
    let shifted = &(&a - &largest) / &Value::scalar(1000.0);
    let exponential = shifted.unary(UnaryOp::Exp);
    &exponential / &Value::scalar(exponential.sum(Scope::Row))
}

const SHAPES: &[&[u64]] = &[
    &[1],
    &[3],
    &[65_536],
    &[65_537],
    &[131_073],
    &[7, 5],
    &[1, 40_000],
    &[40_000, 1],
    &[300, 501],
    &[2, 70_001],
    &[2500, 33],
    &[5, 3, 4001],
    &[3, 2, 50_000],
];

#[test]
fn inner_products_of_every_scope() {
    for shape in SHAPES {
        let inputs = inputs(2, shape.iter().product(), DType::Bf16);
        for scope in [Scope::Tensor, Scope::Row, Scope::Column] {
            check::<f32>(&gram(scope), shape, &inputs, DType::Bf16);
        }
    }
}

#[test]
fn the_largest_of_every_scope() {
    let x = Value::input(0);
    let negative = &Value::scalar(-600.0) - &x;
    for shape in [&[3_u64, 5][..], &[2500, 33], &[2, 70_001]] {
        let inputs = inputs(1, shape.iter().product(), DType::F32);
        for scope in [Scope::Tensor, Scope::Row, Scope::Column] {
            let formula = &x + &Value::scalar(negative.max(scope));
            check::<f32>(&formula, shape, &inputs, DType::F32);
        }
    }
}

#[test]
fn row_reductions_of_row_reductions() {
    for shape in [&[7_u64, 5][..], &[300, 501], &[2, 70_001]] {
        let inputs = inputs(1, shape.iter().product(), DType::F32);
        check::<f32>(&rows_of_rows(), shape, &inputs, DType::F32);
    }
}

#[test]
fn every_type_of_input_and_output() {
    let shape = &[3_u64, 30_001];
    for dtype in [DType::F16, DType::Bf16, DType::F32] {
        let inputs = inputs(2, shape.iter().product(), dtype);
        check::<f32>(&gram(Scope::Tensor), shape, &inputs, dtype);
        check::<f64>(&gram(Scope::Tensor), shape, &inputs, DType::F64);
    }
    let inputs = inputs(2, shape.iter().product(), DType::F64);
    check::<f64>(&gram(Scope::Row), shape, &inputs, DType::Bf16);
}

/// The fused paths give what the general one gives.
#[test]
fn weighted_sums_and_shifted_sums() {
    let shape = &[70_001_u64];
    for models in 1..=6 {
        let inputs = inputs(models + 1, 70_001, DType::Bf16);
        let base = Value::input(models as usize);
        let terms = |of: &dyn Fn(usize) -> Value| {
            let weight = |at: u64| 0.3 + 0.2 * at as f64;
            Value::weighted_sum((0..models).map(|at| (weight(at), of(at as usize))))
        };
        let plain = terms(&Value::input);
        let shifted = &base + &terms(&|at| &Value::input(at) - &base);
        let scaled = &base + &terms(&|at| &Value::input(at) - &base).scaled(0.7);
        for formula in [plain, shifted, scaled] {
            for output in [DType::Bf16, DType::F16, DType::F32] {
                check::<f32>(&formula, shape, &inputs, output);
            }
        }
    }
}

/// Task vectors thinned at random, rescaled to their L1 norms, and put onto their base: of one type,
/// which is fused, and of several.
#[test]
fn task_vectors_thinned_at_random() {
    let shape = &[70_001_u64];
    let base = Value::input(0);
    let thinned = |at: usize, rescale: bool| {
        let vector = &Value::input(at) - &base;
        let kept = vector.masked(&Value::random_mask(0.3, at as u32));
        let sums = [vector.absolute_sum(Scope::Tensor), kept.absolute_sum(Scope::Tensor)];
        let ratio = compute(&sums, 1, |sums| vec![sums[0] / sums[1]]);
        if rescale { kept.scaled(ratio[0].clone()) } else { kept }
    };
    let formulas = |models: usize| {
        let mut formulas = Vec::new();
        for rescale in [false, true] {
            let weight = |at: usize| 0.5 - 0.3 * at as f64;
            let terms = || (1..=models).map(|at| (weight(at), thinned(at, rescale)));
            for sum in [
                Value::weighted_sum(terms()),
                Value::elect(terms(), false),
                Value::elect(terms(), true),
            ] {
                formulas.push(&base + &sum);
                formulas.push(&base + &sum.scaled(0.7));
            }
        }
        formulas
    };
    for models in [1, 3, 4] {
        let inputs = inputs(models + 1, shape[0], DType::Bf16);
        formulas(models as usize).iter().for_each(|f| check::<f32>(f, shape, &inputs, DType::Bf16));
    }
    for dtype in [DType::Bf16, DType::F16, DType::F32, DType::F64] {
        let uniform = inputs(3, shape[0], dtype);
        let mut mixed = uniform.clone();
        mixed[2] = inputs(1, shape[0], DType::Bf16).remove(0);
        // The last ones have everything: ratios, votes, averages, a factor for all.
        for formula in formulas(2).iter().rev().take(3) {
            for inputs in [&uniform, &mixed] {
                if dtype == DType::F64 {
                    check::<f64>(formula, shape, inputs, dtype);
                } else {
                    check::<f32>(formula, shape, inputs, dtype);
                }
            }
        }
    }
}

/// Masks of rows, which begin anywhere: as numbers, and of what they keep.
#[test]
fn masks_begin_where_rows_do() {
    let x = Value::input(0);
    let mask = Value::random_mask(0.3, 1);
    let kept = x.masked(&mask);
    let formula = &(&x * &Value::scalar(mask.sum(Scope::Row)))
        + &Value::scalar(kept.absolute_sum(Scope::Row));
    for shape in [&[300_u64, 501][..], &[3, 70_001]] {
        let inputs = inputs(1, shape.iter().product(), DType::Bf16);
        check::<f32>(&formula, shape, &inputs, DType::F32);
    }
}

/// Rule 3: zero coefficients skip, also when they are known only after a reduction.
#[test]
fn a_zero_coefficient_skips_its_term() {
    let (a, b) = (Value::input(0), Value::input(1));
    let coefficients = compute(&[a.dot(&a, Scope::Tensor)], 2, |_| vec![1.0, 0.0]);
    let formula = Value::weighted_sum(coefficients.into_iter().zip([a, b]));
    let finite = ArraySource::new::<f32>(&[1.0, -0.0, 3.0], DType::F32);
    let infinite = ArraySource::new::<f32>(&[f32::INFINITY; 3], DType::F32);
    let inputs = [finite, infinite];
    check::<f32>(&formula, &[3], &inputs, DType::F32);
    for settings in settings() {
        let merged = merged(&formula, &[3], &inputs, DType::F32, &settings);
        let values: &[f32] = bytemuck::cast_slice(&merged);
        assert_eq!(
            values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            [1.0_f32.to_bits(), (-0.0_f32).to_bits(), 3.0_f32.to_bits()]
        );
    }
}

/// Masks that are kept between passes are those that are drawn anew: with room for them, and in the
/// least memory, where there is none.
#[test]
fn random_masks_are_kept_where_there_is_room() {
    let x = Value::input(0);
    let rescaled = |stream: u32| {
        let thinned = x.masked(&Value::random_mask(0.3, stream));
        (thinned.absolute_sum(Scope::Tensor), thinned)
    };
    let sum = Value::weighted_sum((0..12).map(rescaled));
    let shape = [(1 << 21) + 5];
    let inputs = inputs(1, shape[0], DType::Bf16);
    let run = |settings: &_| try_merged(&sum, &shape, &inputs, DType::F32, settings);
    let room_for_all = 12 * shape[0] / 8;
    let (kept, report) = run(&settings()[0]).unwrap();
    assert!(report.memory.kept_room > room_for_all);
    let (drawn, report) = run_in_least_memory(run);
    assert!(report.memory.kept_room < room_for_all, "{}", report.memory.kept_room);
    assert!(kept == drawn, "bytes differ");
}

/// What passes over the tensor need of short rows is kept where there is room, and found again in the least
/// memory, where there is none: numbers of rows that need each other, sums over the tensor, and each other
/// by way of such a sum; and where rows are computed with.
#[test]
fn numbers_about_rows_are_kept_where_there_is_room() {
    let (a, b) = (Value::input(0), Value::input(1));
    let largest = a.abs().max(Scope::Row);
    let relative = &b / &(&Value::scalar(largest.clone()) + &Value::scalar(1.0));
    let spread = relative.absolute_sum(Scope::Row);
    let weights = compute(&[spread.clone(), largest], 1, |row| vec![row[0] / (1.0 + row[1])]);
    let scaled = &a * &Value::scalar(weights[0].clone());
    let total = scaled.dot(&scaled, Scope::Tensor);
    let per_total = compute(&[total], 1, |total| vec![1.0 / (1.0 + total[0])]);
    let small = &b * &Value::scalar(per_total[0].clone());
    let again = &small * &Value::scalar(small.max(Scope::Row));
    let formula = |elements: u64| {
        let kept = scaled.masked(&again.abs().largest((elements / 3) as f64));
        &kept + &Value::scalar(spread.clone())
    };
    let shapes: [&[u64]; 9] = [
        &[3, 1],
        &[2500, 33],
        &[1100, 63],
        &[1100, 64],
        &[300, 501],
        &[5, 3, 4001],
        &[3, 65_535],
        &[3, 65_536],
        &[3, 65_537],
    ];
    for shape in shapes {
        let elements = shape.iter().product();
        let inputs = inputs(2, elements, DType::Bf16);
        check::<f32>(&formula(elements), shape, &inputs, DType::Bf16);
    }
}

/// Formulas over the same inputs made in one go are those made one by one, whatever they share.
#[test]
fn several_outputs_at_once() {
    let (a, b) = (Value::input(0), Value::input(1));
    let difference = || &b - &a;
    let largest = || difference().masked(&difference().abs().largest(30_000.0));
    let formulas = [
        a.clone(),
        gram(Scope::Tensor),
        Value::weighted_sum([(0.25, a.clone()), (0.75, b.clone())]),
        &a + &largest().scaled(0.5),
        &a + &largest().scaled(0.75),
        &a + &difference().masked(&Value::random_mask(0.5, 1)),
        gram(Scope::Row),
    ];
    for shape in [&[300_u64, 501][..], &[2, 70_001]] {
        let inputs = inputs(2, shape.iter().product(), DType::Bf16);
        for dtype in [DType::Bf16, DType::F64] {
            for settings in settings() {
                let one = |formula| merged(formula, shape, &inputs, dtype, &settings);
                let expected: Vec<_> = formulas.iter().map(one).collect();
                assert!(all_merged(&formulas, shape, &inputs, dtype, &settings) == expected);
            }
        }
    }
}

/// A copied output keeps the bits of a NaN, also where another output is computed beside it.
#[test]
fn a_copy_beside_other_outputs_keeps_its_bits() {
    let pattern = [0x7F81_u16, 0xFFC1, 0x3F80, 0x8000];
    let bytes: Vec<u8> = pattern.iter().cycle().take(5000).flat_map(|b| b.to_le_bytes()).collect();
    let inputs = [ArraySource::from_bytes(bytes.clone(), DType::Bf16)];
    let formulas = [Value::input(0).abs(), Value::input(0)];
    let outputs = all_merged(&formulas, &[5000], &inputs, DType::Bf16, &settings()[0]);
    assert!(outputs[1] == bytes);
    assert_eq!(&outputs[0][..2], &[0xC0, 0x7F]);
}

/// Zeros of both signs and NaN have one maximum, whatever the scope.
#[test]
fn the_largest_of_zeros_and_of_nan() {
    let x = Value::input(0);
    let values = [0.0, -0.0, -1.0, -0.0, 0.0, -2.0, -0.0, -0.0, f64::NAN, 1.0, 2.0, -f64::NAN];
    let inputs = [ArraySource::new::<f64>(&values, DType::F32)];
    for scope in [Scope::Tensor, Scope::Row, Scope::Column] {
        // 1 / +0 and 1 / −0 are far apart.
        let inverse = &Value::scalar(1.0) / &Value::scalar(x.max(scope));
        check::<f32>(&inverse, &[4, 3], &inputs, DType::F32);
        check::<f32>(&Value::scalar(x.max(scope)), &[12], &inputs, DType::F32);
    }
}

#[test]
fn the_smallest_of_none_is_no_number() {
    let x = Value::input(0);
    let none = Value::scalar(x.order_statistic(0.0));
    check::<f32>(&(&x + &none), &[300], &inputs(1, 300, DType::F32), DType::F32);
}

/// A number of a row and a column at once is told to be impossible, not computed wrongly.
#[test]
fn what_no_pass_can_give_is_an_error() {
    let x = Value::input(0);
    let sums = [x.sum(Scope::Row), x.sum(Scope::Column)];
    let both = compute(&sums, 1, |sums| vec![sums[0] + sums[1]]);
    let inputs = inputs(1, 9, DType::F32);
    let formula = x.scaled(both[0].clone());
    let error = try_merged(&formula, &[3, 3], &inputs, DType::F32, &settings()[0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Plan);
    assert_eq!(error.message(), "a formula needs a number that no pass can give");
    // As a product there are two numbers, each with a scope of its own.
    let product = x.scaled(sums[0].clone()).scaled(sums[1].clone());
    check::<f32>(&product, &[3, 3], &inputs, DType::F32);
}

/// A source with fewer bytes than its shape says makes the worker that reads it panic.
#[test]
fn a_panic_of_a_worker_is_told_as_a_bug() {
    let short = [ArraySource::from_bytes(vec![0; 4], DType::F32)];
    for settings in settings() {
        let error =
            try_merged(&Value::input(0), &[300], &short, DType::F32, &settings).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(error.message(), "a worker of the engine panicked");
        assert!(error.parts().tensor.is_some());
        assert!(error.parts().advice.unwrap().starts_with("this is a bug in oxmerge"));
    }
}

/// A side of a select is not computed for elements in a row of which none takes it.
#[test]
fn sides_of_a_select_that_nothing_takes() {
    let count = 2048;
    let masks = [(0.0, 0.0), (-0.0, -0.0), (1.0, 1.0), (0.0, 1.0), (0.0, f64::NAN), (2.0, 0.0)];
    let each = |(all, one): (f64, f64)| (0..count).map(move |at| if at == 700 { one } else { all });
    let mask: Vec<f64> = masks.into_iter().cycle().take(40).flat_map(each).collect();
    let elements = mask.len() as u64;
    let values = [weights(elements, 1), weights(elements, 2)];
    let inputs = [&mask, &values[0], &values[1]].map(|each| ArraySource::new(each, DType::F32));
    let [mask, a, b] = [0, 1, 2].map(Value::input);
    let deep = |x: &Value| &(&(x + x).unary(UnaryOp::Exp) * &b) - &(x * x);
    let both = mask.select(&deep(&a), &deep(&b));
    let shared = deep(&a);
    let nested = mask.select(&a, &a.binary(BinaryOp::Greater, &b).select(&shared, &deep(&both)));
    for formula in [&both, &nested, &(&nested * &shared), &mask.select(&nested, &both)] {
        check::<f32>(formula, &[elements], &inputs, DType::F32);
        let sum = Value::scalar(formula.sum(Scope::Row));
        check::<f32>(&(&a + &sum), &[elements / 512, 512], &inputs, DType::F32);
    }
}
