//! Rows by token: what is gathered while it is read is what a tensor of those rows would give.

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::Settings;
use oxmerge::engine::control::Control;
use oxmerge::engine::rows::RowsSource;
use oxmerge::engine::source::{Sink, Source};
use oxmerge::engine::task::{Task, Work};
use oxmerge::error::Result;
use oxmerge::formula::{Scope, Value, compute};
use oxmerge::io::AlignedBuffer;
use oxmerge::kernels::{Level, narrow, widen};
use oxmerge::plan::{MOST_ROWS, Origin, RowMap};
use proptest::prelude::*;

use super::{ArraySink, ArraySource, merged, run_in_least_memory, settings, weights};

/// Whole tensors, and the rows that are made of them.
struct Case {
    parts: Vec<Arc<ArraySource>>,
    rows: Vec<u64>,
    width: u64,
    runs: Vec<(u32, Origin)>,
}

impl Case {
    fn new(width: u64, parts: &[(u64, DType)], runs: Vec<(u32, Origin)>) -> Self {
        let part = |(seed, &(rows, dtype)): (u64, &(u64, DType))| {
            ArraySource::new(&weights(rows * width, seed), dtype)
        };
        let rows = parts.iter().map(|(rows, _)| *rows).collect();
        Self { parts: (1..).zip(parts).map(part).collect(), rows, width, runs }
    }

    fn map(&self) -> RowMap {
        let map = RowMap::of(self.runs.iter().cloned().map(Ok)).unwrap();
        map.check(&self.rows).unwrap();
        map
    }

    fn types(&self) -> Vec<DType> {
        self.parts.iter().map(|part| part.dtype()).collect()
    }

    fn source(&self) -> Arc<RowsSource> {
        let parts = self.parts.iter().map(|part| Arc::clone(part) as Arc<dyn Source>).collect();
        Arc::new(RowsSource::new(Arc::new(self.map()), parts, self.width))
    }

    /// The tensor, row by row, as the words say it.
    fn oracle(&self) -> Arc<ArraySource> {
        let dtype = self.map().dtype(&self.types());
        let parts: Vec<Vec<f64>> = self.parts.iter().map(|part| part.widened()).collect();
        let row = |(part, row): (u32, u32)| {
            let start = u64::from(row) * self.width;
            &parts[part as usize][start as usize..(start + self.width) as usize]
        };
        let mut values: Vec<f64> = Vec::new();
        let rounded = |values: &[f64]| {
            let mut bytes = vec![0; values.len() * dtype.size()];
            narrow(Level::portable(), values, dtype, &mut bytes);
            let mut back = vec![0.0; values.len()];
            widen(Level::portable(), dtype, &bytes, &mut back);
            back
        };
        let mean = |rows: &[&[f64]]| {
            let column = |at| rows.iter().map(|row| row[at]).fold(0.0, |sum, term| sum + term);
            let means = (0..self.width as usize).map(|at| column(at) / rows.len() as f64);
            means.collect::<Vec<f64>>()
        };
        for (count, origin) in &self.runs {
            let above = values.clone();
            for at in 0..*count {
                let new = match origin {
                    Origin::Zero => vec![0.0; self.width as usize],
                    Origin::Part { part, first } => row((*part, first + at)).to_vec(),
                    Origin::Mean(rows) => {
                        mean(&rows.iter().map(|&each| row(each)).collect::<Vec<_>>())
                    }
                    Origin::MeanAbove => {
                        mean(&above.chunks(self.width as usize).collect::<Vec<_>>())
                    }
                };
                values.extend(rounded(&new));
            }
        }
        ArraySource::new(&values, dtype)
    }

    fn shape(&self) -> [u64; 2] {
        [self.map().rows(), self.width]
    }

    /// Runs `formula` over the rows and a plain tensor of their shape, in every way there is.
    fn check(&self, formula: &Value) {
        let (gathered, plain) = (self.source(), self.oracle());
        assert_eq!(gathered.dtype(), plain.dtype());
        let elements = self.shape().iter().product();
        let other = ArraySource::new(&weights(elements, 99), DType::Bf16);
        let run = |settings: &Settings| -> Result<Vec<u8>> {
            let sources: Vec<Arc<dyn Source>> = vec![self.source(), Arc::clone(&other) as _];
            let sink = ArraySink::new(elements as usize, DType::Bf16);
            let task = Task::new(
                super::NAME,
                super::SEED,
                &self.shape(),
                sources,
                vec!["a".to_owned(), "b".to_owned()],
                vec![Arc::clone(&sink) as Arc<dyn Sink>],
                Work::Formulas(vec![formula.clone()]),
            );
            super::run(vec![task], settings, &Control::default())?;
            Ok(sink.bytes())
        };
        let inputs = [plain, Arc::clone(&other)];
        for settings in settings() {
            let expected = merged(formula, &self.shape(), &inputs, DType::Bf16, &settings);
            assert!(run(&settings).unwrap() == expected, "{:?} {settings:?}", self.runs);
        }
        let expected = merged(formula, &self.shape(), &inputs, DType::Bf16, &settings()[0]);
        assert!(run_in_least_memory(run) == expected, "{:?} in the least memory", self.runs);
    }
}

/// A weighted sum, with a sum over the tensor before it, so that the rows are read twice.
fn formula() -> Value {
    let (one, other) = (Value::input(0), Value::input(1));
    let square = one.dot(&other, Scope::Tensor);
    let weight = compute(&[square], 1, |square| vec![1.0 / (1.0 + square[0].abs())]);
    Value::weighted_sum([(weight[0].clone(), one), (0.5.into(), other)])
}

fn part(part: u32, first: u32) -> Origin {
    Origin::Part { part, first }
}

#[test]
fn every_kind_of_row() {
    let runs = vec![
        (60, part(0, 0)),
        (1, Origin::Mean(vec![(0, 3), (1, 50), (1, 3)])),
        (2, Origin::Zero),
        (7, part(1, 40)),
        (1, part(0, 2)),
        (9, Origin::MeanAbove),
    ];
    for (width, types) in [
        (4100, [DType::Bf16, DType::Bf16]),
        (1, [DType::F16, DType::Bf16]),
        (20_000, [DType::F32, DType::F64]),
    ] {
        let case = Case::new(width, &[(64, types[0]), (51, types[1])], runs.clone());
        case.check(&formula());
    }
}

#[test]
fn the_type_of_rows_holds_them() {
    let (bf16, f16, f32, f64) = (DType::Bf16, DType::F16, DType::F32, DType::F64);
    let taken = |parts: &[u32]| {
        let runs = parts.iter().map(|&each| Ok((1, part(each, 7))));
        RowMap::of(runs).unwrap()
    };
    assert_eq!(taken(&[0]).dtype(&[bf16, f64]), bf16);
    assert_eq!(taken(&[0, 1]).dtype(&[bf16, f16]), f32);
    assert_eq!(taken(&[1, 0]).dtype(&[bf16, f64]), f64);
    let mean = |parts: Vec<(u32, u32)>| RowMap::of([Ok((1, Origin::Mean(parts)))]).unwrap();
    assert_eq!(mean(vec![(0, 1)]).dtype(&[bf16]), f32);
    assert_eq!(mean(vec![(0, 1), (1, 0)]).dtype(&[bf16, f64]), f64);
    let zero = RowMap::of([Ok((3, Origin::Zero))]).unwrap();
    assert_eq!(zero.dtype(&[f16]), f16);
}

#[test]
fn runs_that_go_on_are_one() {
    let runs = [(2, part(0, 4)), (3, part(0, 6)), (0, Origin::Zero), (1, part(0, 8))];
    let map = RowMap::of(runs.map(Ok)).unwrap();
    let found: Vec<_> = map.runs().collect();
    assert_eq!(found, [(0..5, &part(0, 4)), (5..6, &part(0, 8))]);
    assert!(RowMap::of([Ok((5, part(1, 0)))]).unwrap().is_whole(1, 5));
    assert!(!RowMap::of([Ok((5, part(1, 0)))]).unwrap().is_whole(1, 6));
}

#[test]
fn maps_that_make_no_sense_are_refused() {
    let wrong = [
        vec![(1, Origin::MeanAbove)],
        vec![(1, part(0, 0)), (1, Origin::MeanAbove), (1, Origin::Zero)],
        vec![(1, Origin::Mean(vec![]))],
        vec![(MOST_ROWS as u32 + 1, Origin::Zero)],
        vec![(u32::MAX, Origin::Zero), (u32::MAX, Origin::Zero)],
        vec![(1, part(u32::MAX, 0))],
    ];
    for runs in wrong {
        assert!(RowMap::of(runs.clone().into_iter().map(Ok)).is_err(), "{runs:?}");
    }
    let map = RowMap::of([Ok((2, part(1, 3))), Ok((1, Origin::Mean(vec![(0, 9)])))]).unwrap();
    map.check(&[10, 5]).unwrap();
    for rows in [&[9, 5][..], &[10, 4], &[10]] {
        assert!(map.check(rows).is_err(), "{rows:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_map(
        width in prop_oneof![1..40u64, 9000..9100u64],
        runs in prop::collection::vec((1..30u32, 0..4u32, 0..2u32, 0..20u32), 1..12),
        types in prop::sample::select(vec![
            (DType::Bf16, DType::Bf16), (DType::F16, DType::Bf16), (DType::F32, DType::F64),
        ]),
        ends_in_mean: bool,
    ) {
        let run = |(count, kind, of, first): (u32, u32, u32, u32)| match kind {
            0 => (count, Origin::Zero),
            1 => (count, Origin::Mean(vec![(of, first), (1 - of, count), (of, first)])),
            _ => (count, part(of, first)),
        };
        let mut runs: Vec<_> = runs.into_iter().map(run).collect();
        if ends_in_mean {
            runs.push((3, Origin::MeanAbove));
        }
        Case::new(width, &[(50, types.0), (50, types.1)], runs).check(&formula());
    }

    #[test]
    fn any_range(start in 0..900u64, length in 0..900u64) {
        let runs = vec![
            (30, part(0, 5)), (1, Origin::Mean(vec![(0, 0), (1, 9)])), (20, part(1, 0)),
            (9, Origin::MeanAbove),
        ];
        let case = Case::new(15, &[(40, DType::Bf16), (20, DType::F16)], runs);
        let end = (start + length).min(900);
        let (mut one, mut other) = (AlignedBuffer::default(), AlignedBuffer::default());
        let (gathered, plain) = (case.source(), case.oracle());
        prop_assert_eq!(
            gathered.read(start..end, &mut one).unwrap(),
            plain.read(start..end, &mut other).unwrap()
        );
    }
}
