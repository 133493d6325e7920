//! Digests and statistics of outputs, against BLAKE3 of the whole and the oracle of the kernels.

use std::ops::Range;
use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::control::Control;
use oxmerge::engine::digest::{Digester, TensorDigest};
use oxmerge::engine::source::Sink;
use oxmerge::engine::task::{Task, Work};
use oxmerge::engine::{Report, Settings, run};
use oxmerge::error::Result;
use oxmerge::formula::{Scope, Value, compute};
use oxmerge::io::AlignedBuffer;
use oxmerge::kernels::{Level, oracle};
use proptest::prelude::*;

use super::{ArraySink, ArraySource, NAME, SEED, inputs, settings, sources, weights};

/// A tensor in memory, and its digest.
#[derive(Debug)]
struct Digested {
    array: Arc<ArraySink>,
    digester: Digester,
}

impl Digested {
    fn new(elements: u64, dtype: DType) -> Arc<Self> {
        let array = ArraySink::new(elements as usize, dtype);
        Arc::new(Self { array, digester: Digester::new(dtype, elements) })
    }
}

impl Sink for Digested {
    fn dtype(&self) -> DType {
        self.array.dtype()
    }

    fn digester(&self) -> Option<&Digester> {
        Some(&self.digester)
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        self.array.write(first, buffer, bytes)
    }
}

/// The elements of a tensor as another type has them.
fn rounded(from: DType, bytes: &[u8], to: DType) -> Vec<u8> {
    let elements = bytes.chunks(from.size());
    if from == to {
        return bytes.to_vec();
    }
    let rounded = |element: &[u8]| oracle::narrow::<f64>(to, oracle::widen(from, element));
    elements.flat_map(rounded).collect()
}

/// What should be known of an output.
fn expected(dtype: DType, out: &[u8], reference: Option<(DType, &[u8])>) -> TensorDigest {
    let reference = reference.map(|(from, bytes)| rounded(from, bytes, dtype));
    let found = || oracle::comparison(dtype, out, reference.as_deref());
    let statistics = dtype.is_float().then(found);
    TensorDigest { blake3: blake3::hash(out).into(), statistics }
}

fn any_type() -> impl Strategy<Value = DType> {
    prop::sample::select(
        &[DType::U8, DType::I64, DType::F16, DType::Bf16, DType::F32, DType::F64][..],
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn pieces_of_any_size_in_any_order(
        dtype in any_type(),
        from in prop::option::of(prop::sample::select(&[DType::F16, DType::Bf16, DType::F32][..])),
        elements in prop_oneof![0..3000_u64, 65_000..66_000_u64, 190_000..200_000_u64],
        cuts in prop::collection::vec((any::<u64>(), any::<bool>()), 0..12),
        seed in any::<u64>(),
    ) {
        let bytes = |count: u64, salt: u64| -> Vec<u8> {
            let mut state = seed ^ salt | 1;
            let mut next = || { state = state.wrapping_mul(0x5851_F42D_4C95_7F2D) ^ state >> 31; state };
            (0..count).map(|_| next() as u8).collect()
        };
        let size = dtype.size();
        let out = bytes(elements * size as u64, 2);
        let from = from.filter(|_| dtype.is_float());
        let reference = from.map(|from| (from, bytes(elements * from.size() as u64, 4)));
        // Some cuts lie between whole cells, as the engine's mostly do.
        let cut = |&(at, whole): &(u64, bool)| {
            let at = at % (elements + 1);
            if whole { at / 1024 * 1024 } else { at }
        };
        let mut ends: Vec<u64> = cuts.iter().map(cut).chain([0, elements]).collect();
        ends.sort_unstable();
        let mut pieces: Vec<Range<u64>> = ends.windows(2).map(|pair| pair[0]..pair[1]).collect();
        pieces.sort_by_key(|piece| piece.start.wrapping_mul(seed | 1) >> 7);
        let digester = Digester::new(dtype, elements);
        for piece in pieces {
            let part = |size: usize| piece.start as usize * size..piece.end as usize * size;
            let reference = reference.as_ref();
            let reference = reference.map(|(from, bytes)| (*from, &bytes[part(from.size())]));
            digester.take(Level::detect(), piece.start, &out[part(size)], reference);
        }
        let reference = reference.as_ref().map(|(from, bytes)| (*from, &bytes[..]));
        assert_eq!(digester.finish().unwrap(), expected(dtype, &out, reference));
    }
}

/// Runs `work` over `shape` in every way that must not change a byte, and checks the digests of all
/// outputs, of which each has a reference.
pub(super) fn check(
    work: &Work,
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    outputs: &[(DType, usize)],
) -> Vec<Report> {
    let elements = shape.iter().product();
    let run_with = |settings: Settings| {
        let sinks: Vec<_> =
            outputs.iter().map(|&(dtype, _)| Digested::new(elements, dtype)).collect();
        let task = Task::new(
            NAME,
            SEED,
            shape,
            sources(inputs),
            vec!["a".to_owned(); inputs.len()],
            sinks.iter().map(|sink| Arc::clone(sink) as Arc<dyn Sink>).collect(),
            work.clone(),
        );
        let report = run(vec![task.with_base(Some(1))], &settings, &Control::default()).unwrap();
        for (sink, &(dtype, reference)) in sinks.iter().zip(outputs) {
            let (from, bytes) = inputs[reference].parts();
            let expected = expected(dtype, &sink.array.bytes(), Some((from, bytes)));
            assert_eq!(sink.digester.finish().unwrap(), expected, "{shape:?} {settings:?}");
        }
        report
    };
    settings().into_iter().map(run_with).collect()
}

/// A sum whose coefficients are found by `scope`.
fn by(scope: Scope) -> Value {
    let (a, b) = (Value::input(0), Value::input(1));
    let weights = compute(&[a.dot(&b, scope), b.dot(&b, scope)], 1, |g| vec![g[0] / (g[1] + 1.0)]);
    &(&a * &Value::scalar(weights[0].clone())) + &b
}

#[test]
fn outputs_of_every_kind_of_pass() {
    for shape in
        [&[1_u64][..], &[70_001], &[300, 501], &[2, 70_001], &[5, 3, 40_001], &[3, 131_072]]
    {
        let inputs = inputs(2, shape.iter().product(), DType::Bf16);
        for scope in [Scope::Tensor, Scope::Row, Scope::Column] {
            let formulas = vec![by(scope)];
            check(&Work::Formulas(formulas), shape, &inputs, &[(DType::Bf16, 1)]);
        }
    }
}

/// As in a sweep: what is read for one of several outputs is no reference of another.
#[test]
fn each_output_has_the_reference_that_it_would_have_alone() {
    let (a, b, c) = (Value::input(0), Value::input(1), Value::input(2));
    let formulas = vec![&a + &c, c.scaled(2.0), &b + &c, c];
    let shape = [70_001];
    let mut inputs = inputs(3, shape[0], DType::F32);
    inputs[2] = ArraySource::new(&weights(shape[0], 9), DType::F16);
    let outputs = [(DType::F32, 0), (DType::Bf16, 2), (DType::F64, 1), (DType::F16, 2)];
    check(&Work::Formulas(formulas), &shape, &inputs, &outputs);
}

#[test]
fn copies() {
    let shape = [70_001];
    for dtype in [DType::Bf16, DType::U8] {
        let bytes: Vec<u8> = (0..shape[0] as usize * dtype.size()).map(|at| at as u8).collect();
        let input = || ArraySource::from_bytes(bytes.clone(), dtype);
        check(&Work::Identical, &shape, &[input(), input()], &[(dtype, 1)]);
    }
}
