//! A source that an adapter changes: what is computed while it is read is what the words say.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::adapted::{Desks, adapted, task_number};
use oxmerge::engine::control::Control;
use oxmerge::engine::source::{Sink, Source};
use oxmerge::engine::task::{Task, Work};
use oxmerge::engine::{Settings, run};
use oxmerge::error::Result;
use oxmerge::formula::{Scope, Value, compute};
use oxmerge::io::{AlignedBuffer, InputReader, ReadPath};
use oxmerge::kernels::{BLOCK, LANES, Level, Real, fold_halves, narrow, oracle, widen};
use oxmerge::plan::{Adapted, Factor, InputFile, Magnitude, Replaced, Term};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::{ArraySink, ArraySource, merged, run_in_least_memory, settings, weights};

/// An adapter in a file, and the numbers that it has there.
struct Case {
    shape: [u64; 2],
    base: Arc<ArraySource>,
    change: Arc<Adapted>,
    file: NamedTempFile,
    numbers: Vec<f64>,
    dtype: DType,
}

/// How the factors of a term lie in the file.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// As those of a linear layer.
    Straight,
    /// As those of an embedding, or of a layer that is stored transposed.
    Crossed,
    /// The left one as that of experts: steps of the rank apart.
    Apart,
    /// The right one is nothing but ones.
    Ones,
}

impl Case {
    fn new(shape: [u64; 2], dtype: DType, terms: &[(u64, u64, u64, f64, Lie)]) -> Self {
        let [rows, columns] = shape;
        let mut case = Self {
            shape,
            base: ArraySource::new(&weights(rows * columns, 7), dtype),
            change: Arc::new(Adapted {
                dtype,
                columns,
                terms: Vec::new(),
                magnitude: None,
                replaced: None,
                strides: None,
            }),
            file: NamedTempFile::new().unwrap(),
            numbers: Vec::new(),
            dtype: DType::Bf16,
        };
        let terms = terms.iter().map(|&(start, end, rank, scale, lie)| {
            let lines = end - start;
            let straight = |case: &mut Self, lines: u64| Factor {
                line: rank,
                step: 1,
                ..case.store(lines * rank)
            };
            let crossed = |case: &mut Self, lines: u64| Factor {
                line: 1,
                step: lines,
                ..case.store(lines * rank)
            };
            let (left, right) = match lie {
                Lie::Straight => (straight(&mut case, lines), Some(crossed(&mut case, columns))),
                Lie::Crossed => (crossed(&mut case, lines), Some(straight(&mut case, columns))),
                Lie::Apart => {
                    let left = Factor { line: 3 * rank, step: 3, ..case.store(3 * lines * rank) };
                    (left, Some(crossed(&mut case, columns)))
                }
                Lie::Ones => (straight(&mut case, lines), None),
            };
            Term { rows: start..end, rank, scale, left, right }
        });
        let terms = terms.collect();
        case.change_to(|change| change.terms = terms);
        case
    }

    fn change_to(&mut self, set: impl FnOnce(&mut Adapted)) {
        let mut change = Adapted::clone(&self.change);
        set(&mut change);
        self.change = Arc::new(change);
    }

    /// Takes so many numbers into the file; where they are.
    fn store(&mut self, count: u64) -> Factor {
        let start = (self.numbers.len() * self.dtype.size()) as u64;
        let seed = 100 + self.numbers.len() as u64;
        let numbers = weights(count, seed);
        let mut bytes = vec![0; numbers.len() * self.dtype.size()];
        narrow(Level::portable(), &numbers, self.dtype, &mut bytes);
        self.file.as_file_mut().write_all(&bytes).unwrap();
        let mut stored = vec![0.0; numbers.len()];
        widen(Level::portable(), self.dtype, &bytes, &mut stored);
        self.numbers.extend(stored);
        Factor { file: 0, dtype: self.dtype, start, line: 1, step: 1 }
    }

    fn with_magnitude(mut self, of_rows: bool) -> Self {
        let count = self.shape[usize::from(!of_rows)];
        let Factor { file, dtype, start, .. } = self.store(count);
        self.change_to(|change| {
            change.magnitude = Some(Magnitude { file, dtype, start, of_rows });
        });
        self
    }

    fn with_rows(mut self, rows: &[u64]) -> Self {
        let Factor { file, dtype, start, .. } = self.store(self.shape[1] * rows.len() as u64);
        let places = (0..rows.len() as u64).rev();
        let rows = rows.iter().copied().zip(places).collect();
        self.change_to(|change| {
            change.replaced = Some(Replaced { rows, file, dtype, start });
        });
        self
    }

    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn result(&self) -> DType {
        self.change.result(false)
    }

    fn source(&self, desks: &Desks) -> Arc<dyn Source> {
        let path = self.file.path();
        let input = InputFile::of(&File::open(path).unwrap(), path).unwrap();
        self.change.check(self.elements(), std::slice::from_ref(&input)).unwrap();
        let reader = Arc::new(InputReader::open(&input, ReadPath::Auto).unwrap());
        let base = Arc::clone(&self.base) as Arc<dyn Source>;
        let (files, place) = (vec![(0, reader)], (task_number(), 0));
        adapted(base, &self.change, self.result(), self.elements(), files, place, desks)
    }

    fn number<T: Real>(&self, factor: &Factor, line: u64, step: u64) -> T {
        let at = factor.start / self.dtype.size() as u64 + line * factor.line + step * factor.step;
        T::from_f64(self.numbers[at as usize])
    }

    /// The tensor, element by element.
    fn values<T: Real>(&self) -> Vec<T> {
        let [rows, columns] = self.shape;
        let mut values: Vec<T> = self.base.widened();
        for term in &self.change.terms {
            for row in term.rows.clone() {
                for column in 0..columns {
                    let product = |step| {
                        let left = self.number(&term.left, row - term.rows.start, step);
                        let right = term.right.as_ref();
                        let right = right.map(|right| self.number(right, column, step));
                        (left, right.unwrap_or(T::ONE))
                    };
                    let products: Vec<_> = (0..term.rank).map(product).collect();
                    let value = &mut values[(row * columns + column) as usize];
                    *value = oracle::low_rank(*value, T::from_f64(term.scale), &products);
                }
            }
        }
        if let Some(Magnitude { start, of_rows, .. }) = self.change.magnitude {
            let numbers = Factor { file: 0, dtype: self.dtype, start, line: 1, step: 1 };
            let factor = |line: u64, norm: f64| {
                let magnitude: T = self.number(&numbers, line, 0);
                if norm == 0.0 { T::ZERO } else { T::from_f64(magnitude.to_f64() / norm) }
            };
            let square = |value: &T| value.to_f64() * value.to_f64();
            if of_rows {
                for (row, line) in (0..).zip(values.chunks_mut(columns as usize)) {
                    let sums = line.chunks(BLOCK).map(|block| {
                        let mut lanes = [0.0; LANES];
                        let squares: Vec<f64> = block.iter().map(square).collect();
                        oracle::reduce(&squares, &mut lanes, |a, b| a + b);
                        oracle::fold_halves(&lanes)
                    });
                    let norm = fold_halves(&mut sums.collect()).sqrt();
                    line.iter_mut().for_each(|value| *value = factor(row, norm) * *value);
                }
            } else {
                for column in 0..columns {
                    let at = |row: u64| (row * columns + column) as usize;
                    let sum = (0..rows).fold(0.0, |sum, row| sum + square(&values[at(row)]));
                    let factor = factor(column, f64::sqrt(sum));
                    (0..rows).for_each(|row| values[at(row)] = factor * values[at(row)]);
                }
            }
        }
        if let Some(Replaced { rows, start, .. }) = &self.change.replaced {
            let line = Factor { file: 0, dtype: self.dtype, start: *start, line: columns, step: 1 };
            for &(row, place) in rows {
                for column in 0..columns {
                    values[(row * columns + column) as usize] = self.number(&line, place, column);
                }
            }
        }
        values
    }

    fn oracle(&self) -> Arc<ArraySource> {
        match self.result() {
            DType::F64 => ArraySource::new(&self.values::<f64>(), DType::F64),
            _ => ArraySource::new(&self.values::<f32>(), DType::F32),
        }
    }

    /// Runs `formula` over the source and a plain one, in every way there is.
    fn check(&self, formula: &Value) {
        let other = ArraySource::new(&weights(self.elements(), 99), DType::Bf16);
        let desks = Desks::default();
        let run_one = |settings: &Settings| -> Result<Vec<u8>> {
            let sources = vec![self.source(&desks), Arc::clone(&other) as Arc<dyn Source>];
            let sink = ArraySink::new(self.elements() as usize, DType::Bf16);
            let task = Task::new(
                super::NAME,
                super::SEED,
                &self.shape,
                sources,
                vec!["a".to_owned(), "b".to_owned()],
                vec![Arc::clone(&sink) as Arc<dyn Sink>],
                Work::Formulas(vec![formula.clone()]),
            );
            run(vec![task], settings, &Control::default())?;
            Ok(sink.bytes())
        };
        let inputs = [self.oracle(), Arc::clone(&other)];
        let settings = settings();
        let expected = merged(formula, &self.shape, &inputs, DType::Bf16, &settings[0]);
        for settings in settings {
            assert!(run_one(&settings).unwrap() == expected, "{:?} {settings:?}", self.change);
        }
        assert!(run_in_least_memory(run_one) == expected, "{:?} in the least memory", self.change);
    }
}

/// A weighted sum, with a sum over the tensor before it, so that it is read twice.
fn formula() -> Value {
    let (one, other) = (Value::input(0), Value::input(1));
    let square = one.dot(&other, Scope::Tensor);
    let weight = compute(&[square], 1, |square| vec![1.0 / (1.0 + square[0].abs())]);
    Value::weighted_sum([(weight[0].clone(), one), (0.5.into(), other)])
}

#[test]
fn every_way_that_factors_lie() {
    for (shape, dtype) in [
        ([70, 3001], DType::Bf16),
        ([40_000, 5], DType::F16),
        ([3, 70_001], DType::F32),
        ([1, 140_000], DType::F64),
    ] {
        let rows = shape[0];
        for lie in [Lie::Straight, Lie::Crossed, Lie::Apart] {
            Case::new(shape, dtype, &[(0, rows, 5, 0.37, lie)]).check(&formula());
        }
        Case::new(shape, dtype, &[(0, rows, 1, 2.0, Lie::Ones)]).check(&Value::input(0));
    }
}

#[test]
fn terms_of_some_rows_and_of_others() {
    let terms = [
        (0, 31, 4, 0.5, Lie::Straight),
        (31, 62, 4, 0.5, Lie::Apart),
        (20, 90, 9, -1.5, Lie::Crossed),
        (62, 90, 1, 3.0, Lie::Ones),
    ];
    Case::new([90, 2111], DType::Bf16, &terms).check(&formula());
}

#[test]
fn rows_and_columns_come_to_their_magnitudes() {
    for of_rows in [true, false] {
        for shape in [[70, 3001], [3, 70_001]] {
            let terms = [(0, shape[0], 3, 0.7, Lie::Straight)];
            let case = Case::new(shape, DType::Bf16, &terms).with_magnitude(of_rows);
            case.check(&formula());
        }
    }
}

#[test]
fn rows_are_put_in_last() {
    let terms = [(0, 300, 3, 0.7, Lie::Crossed)];
    let case = Case::new([300, 701], DType::Bf16, &terms).with_rows(&[0, 17, 18, 299]);
    case.with_magnitude(false).check(&formula());
}

#[test]
fn what_does_not_lie_in_the_files_is_refused() {
    let case = Case::new([30, 40], DType::Bf16, &[(0, 30, 4, 0.5, Lie::Straight)]);
    let path = case.file.path();
    let file = InputFile::of(&File::open(path).unwrap(), path).unwrap();
    let refused = |set: &dyn Fn(&mut Adapted)| {
        let mut change = Adapted::clone(&case.change);
        set(&mut change);
        change.check(1200, std::slice::from_ref(&file)).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|change| change.columns = 0));
    assert!(refused(&|change| change.columns = 41));
    assert!(refused(&|change| change.dtype = DType::I8));
    assert!(refused(&|change| change.terms[0].rows = 0..31));
    assert!(refused(&|change| change.terms[0].rows = 5..5));
    assert!(refused(&|change| change.terms[0].rank = 0));
    assert!(refused(&|change| change.terms[0].rank = u64::MAX));
    assert!(refused(&|change| change.terms[0].scale = f64::NAN));
    assert!(refused(&|change| change.terms[0].right = None));
    assert!(refused(&|change| change.terms[0].left.file = 1));
    assert!(refused(&|change| change.terms[0].left.start = 400));
    assert!(refused(&|change| change.terms[0].left.line = u64::MAX / 2));
    assert!(refused(&|change| change.terms[0].left.step = 0));
    assert!(refused(&|change| change.terms[0].left.dtype = DType::I64));
    let replaced = |rows: Vec<(u64, u64)>| Replaced { rows, file: 0, dtype: DType::Bf16, start: 0 };
    assert!(!refused(&|change| change.replaced = Some(replaced(vec![(3, 1), (29, 0)]))));
    for rows in [vec![], vec![(30, 0)], vec![(4, 0), (4, 1)], vec![(0, u64::MAX)]] {
        assert!(refused(&|change| change.replaced = Some(replaced(rows.clone()))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn any_terms(
        rows in 1..200u64,
        columns in prop_oneof![1..40u64, 2000..2100u64],
        terms in prop::collection::vec(
            (0..200u64, 1..200u64, 1..9u64, -2.0..2.0f64, 0..4usize), 0..4
        ),
        dtype in prop::sample::select(vec![DType::Bf16, DType::F16, DType::F32, DType::F64]),
        scaled in prop::option::of(any::<bool>()),
    ) {
        let lies = [Lie::Straight, Lie::Crossed, Lie::Apart, Lie::Ones];
        let terms: Vec<_> = terms
            .into_iter()
            .map(|(start, count, rank, scale, lie)| {
                let start = start % rows;
                let rank = if lie == 3 { 1 } else { rank };
                (start, rows.min(start + count), rank, scale, lies[lie])
            })
            .collect();
        let case = Case::new([rows, columns], dtype, &terms);
        match scaled {
            None => case.check(&formula()),
            Some(of_rows) => case.with_magnitude(of_rows).check(&formula()),
        }
    }

    #[test]
    fn any_range(start in 0..900u64, length in 0..900u64) {
        let terms = [(0, 60, 4, 0.5, Lie::Straight), (30, 60, 2, 1.5, Lie::Crossed)];
        let case = Case::new([60, 15], DType::Bf16, &terms);
        let end = (start + length).min(900);
        let (mut one, mut other) = (AlignedBuffer::default(), AlignedBuffer::default());
        let (source, plain) = (case.source(&Desks::default()), case.oracle());
        prop_assert_eq!(
            source.read(start..end, &mut one).unwrap(),
            plain.read(start..end, &mut other).unwrap()
        );
    }
}
