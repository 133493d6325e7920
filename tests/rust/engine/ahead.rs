//! Outputs that are computed before it is known what selections keep.

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::memory::resident;
use oxmerge::engine::task::Work;
use oxmerge::engine::{Report, Settings};
use oxmerge::formula::Value;
use oxmerge::kernels::Level;
use proptest::prelude::*;

use super::{
    ArraySource, all_merged, check, digests, expected, run_in_least_memory, settings, try_merged,
    weights,
};

/// What TIES makes of two or three inputs and their base; each density keeps another share.
fn ties(densities: &[f64], elements: u64) -> Value {
    let base = Value::input(0);
    let term = |(at, &density): (usize, &f64)| {
        let vector = &Value::input(at + 1) - &base;
        let count = (density * elements as f64).trunc();
        (0.5, vector.masked(&vector.abs().largest(count)))
    };
    &base + &Value::elect(densities.iter().enumerate().map(term), true)
}

/// What Breadcrumbs makes of one input and its base: the largest of all go as well.
fn breadcrumbs(elements: u64) -> Value {
    let (base, vector) = (Value::input(0), &Value::input(1) - &Value::input(0));
    let largest = |share: f64| vector.abs().largest((share * elements as f64).trunc());
    let kept = &largest(0.7) - &largest(0.05);
    &base + &vector.masked(&kept).scaled(0.5)
}

/// A base and inputs near it: some differences are zero, and many are equal.
fn near(count: u64, elements: u64, step: f64, dtypes: &[DType]) -> Vec<Arc<ArraySource>> {
    let base = weights(elements, 1);
    let values = |seed: u64| -> Vec<f64> {
        let steps = weights(elements, seed + 1);
        base.iter()
            .zip(steps)
            .map(|(base, other)| base + if seed == 0 { 0.0 } else { other * step })
            .collect()
    };
    let dtype = |at: u64| dtypes[at as usize % dtypes.len()];
    (0..=count).map(|at| ArraySource::new::<f64>(&values(at), dtype(at))).collect()
}

fn readings(report: &Report, inputs: &[Arc<ArraySource>]) -> f64 {
    let bytes: usize = inputs.iter().map(|input| input.parts().1.len()).sum();
    report.bytes_read as f64 / bytes as f64
}

#[test]
fn inputs_are_read_once_where_memory_has_room() {
    let elements = 4_000_000;
    let formula = ties(&[0.5, 0.2], elements);
    for step in [1.0 / 512.0, 0.1] {
        let inputs = near(2, elements, step, &[DType::Bf16]);
        let run = |memory: u64| {
            let largest_piece = Some(8);
            let settings = Settings { memory, workers: 2, level: Level::detect(), largest_piece };
            try_merged(&formula, &[elements], &inputs, DType::Bf16, &settings).unwrap()
        };
        let (held, once) = run(1 << 30);
        // Where the last of many equal keys may lie, too much is undecided in a unit of eight.
        let found = readings(&once, &inputs);
        assert!(found < 1.3, "read {found} times at {step}: {once:?}");
        let (some_held, _) = run(resident() + (20 << 20));
        let (read_again, twice) = run_in_least_memory(|settings| {
            try_merged(&formula, &[elements], &inputs, DType::Bf16, settings)
        });
        let found = readings(&twice, &inputs);
        assert!(found > 1.9, "read {found} times at {step}: {twice:?}");
        let expected = expected::<f32>(&formula, &[elements], &inputs, DType::Bf16);
        assert!(held == expected, "bytes differ at {step}");
        assert!(some_held == expected, "bytes differ at {step} where some are held");
        assert!(read_again == expected, "bytes differ at {step} where none is held");
    }
}

/// Where a sample sees other elements than there are, the cuts lie elsewhere, and inputs are read again.
#[test]
fn a_sample_that_misleads_changes_no_byte() {
    // So many elements are sampled in so many runs, which begin so far apart.
    let (elements, runs) = (300_000_u64, 27);
    let stride = elements / runs;
    let value =
        |at: u64| if at % stride < 256 { 8.0 + (at % 5) as f32 } else { (at % 7001) as f32 };
    let values: Vec<f32> = (0..elements).map(value).collect();
    let base = vec![0.0_f32; elements as usize];
    let inputs = [ArraySource::new(&base, DType::F32), ArraySource::new(&values, DType::F32)];
    let formula = ties(&[0.5], elements);
    let (_, report) =
        try_merged(&formula, &[elements], &inputs, DType::F32, &settings()[0]).unwrap();
    let found = readings(&report, &inputs);
    assert!(found > 2.5, "read {found} times: {report:?}");
    check::<f32>(&formula, &[elements], &inputs, DType::F32);
}

#[test]
fn all_types_and_several_outputs() {
    let elements = 140_001;
    let shape = [elements];
    for (dtypes, output) in [
        (&[DType::Bf16][..], DType::Bf16),
        (&[DType::F32, DType::F16], DType::F32),
        (&[DType::Bf16, DType::F64], DType::F16),
    ] {
        let inputs = near(2, elements, 0.01, dtypes);
        let formulas = [ties(&[0.5, 0.9], elements), breadcrumbs(elements), Value::input(1)];
        let is_double = dtypes.contains(&DType::F64);
        let expected = |formula: &Value| {
            if is_double {
                expected::<f64>(formula, &shape, &inputs, output)
            } else {
                expected::<f32>(formula, &shape, &inputs, output)
            }
        };
        let expected: Vec<_> = formulas.iter().map(expected).collect();
        for settings in settings() {
            let found = all_merged(&formulas, &shape, &inputs, output, &settings);
            assert!(found == expected, "bytes differ: {dtypes:?} {settings:?}");
        }
    }
}

#[test]
fn digests_are_those_of_the_finished_output() {
    let elements = 200_001;
    let inputs = near(2, elements, 0.01, &[DType::Bf16]);
    let formulas = vec![ties(&[0.5, 0.2], elements), breadcrumbs(elements)];
    let outputs = [(DType::Bf16, 1), (DType::F32, 1)];
    digests::check(&Work::Formulas(formulas), &[elements], &inputs, &outputs);
}

/// Where many differences are equal, what is undecided lies together: of the other blocks a digest needs
/// nothing that has to be read again.
#[test]
fn blocks_without_undecided_elements_are_digested_at_once() {
    let elements = 2_000_000;
    let inputs = near(1, elements, 1.0 / 512.0, &[DType::Bf16]);
    let formulas = Work::Formulas(vec![ties(&[0.5], elements)]);
    for report in digests::check(&formulas, &[elements], &inputs, &[(DType::Bf16, 1)]) {
        let found = readings(&report, &inputs);
        assert!(found < 1.4, "read {found} times, where once more would be 1.5: {report:?}");
    }
}

/// Numbers of few distinct values, some of them in long runs, NaN and infinities among them.
fn elements() -> impl Strategy<Value = Vec<f32>> {
    let odd = prop::sample::select(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0][..]);
    let small = (-6_i8..6).prop_map(f32::from);
    let any = -1e3_f32..1e3;
    let run = (prop_oneof![1 => odd, 8 => small, 4 => any], 1_usize..400);
    prop::collection::vec(run, 200..900).prop_map(|runs| {
        runs.into_iter().flat_map(|(value, count)| std::iter::repeat_n(value, count)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_elements_and_any_densities(
        parts in [elements(), elements(), elements()],
        count in 66_000_usize..300_000,
        densities in prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..1.0_f64], 2),
        dtype in prop::sample::select(&[DType::Bf16, DType::F32][..]),
    ) {
        let inputs = parts.map(|part| {
            let values: Vec<f32> = part.iter().copied().cycle().take(count).collect();
            ArraySource::new(&values, dtype)
        });
        check::<f32>(&ties(&densities, count as u64), &[count as u64], &inputs, dtype);
    }
}
