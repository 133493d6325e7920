//! The engine on borrowed memory: the same bytes, also where the output is an input; and numbers.

#![expect(unsafe_code, reason = "lends vectors to sources and sinks, as a caller of oxmerge does")]

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::arrays::{ArraySink, ArraySource, run, ulp_distance};
use oxmerge::engine::control::Control;
use oxmerge::engine::source::{Nowhere, Sink, Source};
use oxmerge::engine::task::{Task, Work};
use oxmerge::error::Result;
use oxmerge::formula::oracle::Oracle;
use oxmerge::formula::{Scalar, Scope, Value, compute};
use oxmerge::io::AlignedBuffer;
use oxmerge::kernels::{Level, narrow, widen};
use oxmerge::methods::measures::{difference, soundness};
use proptest::prelude::*;

use super::{NAME, SEED, weights};

/// The bytes of some tensors like weights.
fn bytes(count: u64, elements: u64, dtype: DType) -> Vec<Vec<u8>> {
    let tensor = |seed| {
        let mut bytes = vec![0; elements as usize * dtype.size()];
        narrow(Level::portable(), &weights(elements, seed), dtype, &mut bytes);
        bytes
    };
    (1..=count).map(tensor).collect()
}

fn source(bytes: &[u8], dtype: DType) -> Arc<dyn Source> {
    // SAFETY: the tests keep the vectors until the sources are gone.
    Arc::new(unsafe { ArraySource::new(bytes.as_ptr(), bytes.len(), dtype) })
}

fn sink(bytes: &mut [u8], dtype: DType, is_apart: bool) -> Arc<dyn Sink> {
    // SAFETY: the tests keep the vectors until the sinks are gone, and only use them afterwards.
    Arc::new(unsafe { ArraySink::new(bytes.as_mut_ptr(), bytes.len(), dtype, is_apart) })
}

fn task(shape: &[u64], sources: Vec<Arc<dyn Source>>, sink: Arc<dyn Sink>, work: Work) -> Task {
    let labels = vec!["a".to_owned(); sources.len()];
    Task::new(NAME, SEED, shape, sources, labels, vec![sink], work)
}

fn oracle(shape: &[u64], inputs: &[Vec<u8>], dtype: DType) -> Oracle<f32> {
    let wide = |bytes: &Vec<u8>| {
        let mut values = vec![0.0_f32; bytes.len() / dtype.size()];
        widen(Level::portable(), dtype, bytes, &mut values);
        values
    };
    Oracle::new(NAME, SEED, shape, inputs.iter().map(wide).collect())
}

/// Formulas of each kind: elementwise, fused, with sums, with a selection, with a mask.
fn formulas() -> Vec<Value> {
    let [a, b] = [0, 1].map(Value::input);
    let vector = &b - &a;
    let product = compute(&[a.dot(&b, Scope::Tensor)], 1, |dot| vec![dot[0].abs().sqrt()]);
    vec![
        Value::weighted_sum([(0.3, a.clone()), (0.6, b.clone())]),
        &a + &vector.scaled(0.4),
        a.scaled(product[0].clone()),
        &a + &vector.masked(&vector.abs().largest(500.0)),
        vector.masked(&Value::random_mask(0.3, 1)),
        b,
    ]
}

#[test]
fn borrowed_memory_gives_the_bytes_of_the_oracle() {
    let shape = [3, 70_001];
    for dtype in [DType::Bf16, DType::F32] {
        let inputs = bytes(2, 210_003, dtype);
        for formula in formulas() {
            let values = oracle(&shape, &inputs, dtype).evaluate(&formula);
            let mut expected = vec![0; inputs[0].len()];
            narrow(Level::portable(), &values, dtype, &mut expected);
            for threads in [1, 3] {
                let run = |sources, sink| {
                    let work = Work::Formulas(vec![formula.clone()]);
                    let task = task(&shape, sources, sink, work);
                    run(task, Level::detect(), Some(threads), &Control::default()).unwrap();
                };
                let mut out = vec![0xEE; expected.len()];
                let sources = inputs.iter().map(|input| source(input, dtype)).collect();
                run(sources, sink(&mut out, dtype, true));
                assert!(out == expected, "{formula:?}");
                for taken in [0, 1] {
                    let mut inputs = inputs.clone();
                    let out = sink(&mut inputs[taken], dtype, false);
                    run(inputs.iter().map(|input| source(input, dtype)).collect(), out);
                    assert!(inputs[taken] == expected, "{formula:?} over input {taken}");
                }
            }
        }
    }
}

#[test]
fn masks_can_be_bytes() {
    let inputs = bytes(1, 70_000, DType::Bf16);
    let mask = Value::input(0).abs().largest(1234.0);
    let mut out = vec![0xEE; 70_000];
    let work = Work::Formulas(vec![mask.clone()]);
    let sources = vec![source(&inputs[0], DType::Bf16)];
    let task = task(&[70_000], sources, sink(&mut out, DType::Bool, true), work);
    run(task, Level::detect(), None, &Control::default()).unwrap();
    let expected = oracle(&[70_000], &inputs, DType::Bf16).evaluate(&mask);
    assert!(out.iter().zip(expected).all(|(&byte, value)| f32::from(byte) == value));
}

#[test]
fn numbers_are_those_of_the_oracle() {
    let [a, b] = [0, 1].map(Value::input);
    let dot = a.dot(&b, Scope::Tensor);
    let scalars = vec![
        dot.clone(),
        a.absolute_sum(Scope::Tensor),
        b.max(Scope::Tensor),
        a.abs().order_statistic(300.0),
        compute(&[dot, b.sum(Scope::Tensor)], 1, |sums| vec![sums[0] - sums[1]])[0].clone(),
        Scalar::constant(7.0),
    ];
    for elements in [5000, 200_001] {
        let inputs = bytes(2, elements, DType::F32);
        let oracle = oracle(&[elements], &inputs, DType::F32);
        for threads in [1, 4] {
            let sources = inputs.iter().map(|input| source(input, DType::F32)).collect();
            let work = Work::numbers(scalars.clone());
            let task = task(&[elements], sources, Arc::new(Nowhere(DType::F32)), work);
            let found = run(task, Level::detect(), Some(threads), &Control::default()).unwrap();
            for (number, scalar) in found.iter().zip(&scalars) {
                let expected = oracle.evaluate(&Value::scalar(scalar.clone()))[0];
                assert_eq!(*number as f32, expected, "{scalar:?}");
            }
        }
    }
}

#[test]
fn measures_are_those_of_the_oracle() {
    for (inputs, measure) in [
        (2, difference(false, None)),
        (3, difference(true, None)),
        (1, soundness(None)),
        (2, vec![Value::differing(0, 1)]),
    ] {
        for (dtype, elements) in [(DType::F32, 5000), (DType::Bf16, 200_001)] {
            let mut inputs = bytes(inputs, elements, dtype);
            // Infinities, NaN and zeros of both signs among the others.
            let odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0];
            for (input, step) in inputs.iter_mut().zip([97, 89, 83]) {
                let size = dtype.size();
                for (place, odd) in (0..elements as usize).step_by(step).zip(odd.iter().cycle()) {
                    let place = place * size..(place + 1) * size;
                    narrow(Level::portable(), &[*odd], dtype, &mut input[place]);
                }
            }
            let oracle = oracle(&[elements], &inputs, dtype);
            for threads in [1, 4] {
                let sources = inputs.iter().map(|input| source(input, dtype)).collect();
                let work = Work::numbers(measure.clone());
                let task = task(&[elements], sources, Arc::new(Nowhere(dtype)), work);
                let found = run(task, Level::detect(), Some(threads), &Control::default()).unwrap();
                for (number, scalar) in found.iter().zip(&measure) {
                    let expected = oracle.evaluate(&Value::scalar(scalar.clone()))[0];
                    let is_same =
                        *number as f32 == expected || number.is_nan() && expected.is_nan();
                    assert!(is_same, "{number} is not {expected}: {scalar:?}");
                }
            }
        }
    }
}

#[test]
fn numbers_that_need_no_pass_are_missed_with_a_reason() {
    let task = task(&[0], Vec::new(), Arc::new(Nowhere(DType::F32)), {
        Work::numbers(vec![Value::input(0).sum(Scope::Tensor)])
    });
    let error = run(task, Level::detect(), None, &Control::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is nothing to compute a number from: the array has no elements"
    );
}

#[test]
#[should_panic(expected = "grain 8 is written twice")]
fn a_sink_hands_out_each_grain_once() {
    let mut out = vec![0; 200_000];
    let sink = sink(&mut out, DType::U8, true);
    assert!(sink.place(&(0..65_536)).is_some());
    assert!(sink.place(&(65_536..131_072)).is_some());
    assert!(sink.place(&(131_072..200_000)).is_some());
    let _ = sink.place(&(65_536..200_000));
}

#[test]
fn a_sink_says_whether_it_is_an_input() -> Result<()> {
    let mut out = vec![0; 4];
    assert!(sink(&mut out, DType::U8, true).is_apart());
    let taken = sink(&mut out, DType::U8, false);
    assert!(!taken.is_apart());
    let mut buffer = AlignedBuffer::new(8).unwrap();
    buffer.as_mut_slice().copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    taken.write(0, &buffer, 2..6)?;
    assert_eq!(out, [3, 4, 5, 6]);
    Ok(())
}

#[test]
fn an_output_that_is_an_input_has_the_bytes_of_one_that_is_not() {
    for dtype in [DType::Bf16, DType::F32, DType::F64] {
        for value in formulas() {
            let elements = 150_001;
            let inputs = bytes(3, elements, dtype);
            let work = || Work::Formulas(vec![value.clone()]);
            let go = |inputs: &[Vec<u8>], sink, threads| {
                let sources = inputs.iter().map(|input| source(input, dtype)).collect();
                let task = task(&[elements], sources, sink, work());
                run(task, Level::detect(), Some(threads), &Control::default()).unwrap();
            };
            let mut apart = vec![0; inputs[0].len()];
            go(&inputs, sink(&mut apart, dtype, true), 1);
            for threads in [1, 3] {
                for replaced in 0..3 {
                    let mut inputs = inputs.clone();
                    let (start, length) = (inputs[replaced].as_mut_ptr(), apart.len());
                    // SAFETY: as for `sink`, which cannot have a vector that is an input too.
                    let sink = unsafe { ArraySink::new(start, length, dtype, false) };
                    go(&inputs, Arc::new(sink), threads);
                    assert_eq!(inputs[replaced], apart, "{value:?}");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn distances_are_counted_in_steps(pairs in prop::collection::vec(any::<(u16, u16)>(), 1..300)) {
        let (a, b): (Vec<u16>, Vec<u16>) = pairs.into_iter().unzip();
        let bytes = |bits: &[u16]| bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>();
        for (dtype, infinity) in [(DType::F16, 0x7C00_i64), (DType::Bf16, 0x7F80)] {
            let ordinal = |bits: u16| match i64::from(bits & 0x7FFF) {
                magnitude if magnitude > infinity => infinity + 1,
                magnitude if bits & 0x8000 == 0 => magnitude,
                magnitude => -magnitude,
            };
            let distances = a.iter().zip(&b).map(|(&a, &b)| ordinal(a).abs_diff(ordinal(b)));
            let largest = distances.clone().max().unwrap_or(0);
            let differing = distances.filter(|&distance| distance > 0).count() as u64;
            let (left, right) = (bytes(&a), bytes(&b));
            let sides = (source(&left, dtype), source(&right, dtype));
            for level in Level::available() {
                let found = ulp_distance(&*sides.0, &*sides.1, a.len() as u64, level, Some(2), &Control::default());
                prop_assert_eq!(found.unwrap(), (largest, differing));
            }
        }
    }
}

/// Bytes of one type would be taken for another.
#[test]
fn a_copy_into_another_type_is_refused() {
    let input = vec![1; 40];
    for dtype in [DType::F32, DType::I64] {
        let mut out = vec![0; 80];
        let copy = task(
            &[10],
            vec![source(&input, DType::I32)],
            sink(&mut out[..10 * dtype.size()], dtype, true),
            Work::Identical,
        );
        let error = run(copy, Level::portable(), Some(1), &Control::default()).unwrap_err();
        assert_eq!(error.parts().expected, Some("I32"));
        assert_eq!(error.parts().found, Some(dtype.name()));
        assert_eq!(out, [0; 80]);
    }
}
