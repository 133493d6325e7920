use super::config;
use oxmerge::dtype::DType;
use oxmerge::kernels::{CELL, CELLS, Comparison, Level, compare, narrow, oracle, widen};
use proptest::prelude::*;

use super::TestReal;

const FLOATS: [DType; 4] = [DType::Bf16, DType::F16, DType::F32, DType::F64];

/// How far a sum may be from the exact one, as a part of it.
const ERROR: f64 = 4e-6;

/// Pairs of values, most of which are equal or plain: of a part of a cell, or of several. The squares of
/// some are too large or too small for f32.
fn values() -> impl Strategy<Value = Vec<(f64, f64)>> {
    let plain = (-1000..1000_i32).prop_map(|number| f64::from(number) / 256.0);
    let pair = prop_oneof![
        8 => plain.clone().prop_map(|value| (value, value)),
        8 => (plain.clone(), plain),
        1 => (f64::interesting(), f64::interesting()),
    ];
    let plain_only = prop::collection::vec((-9..9_i8, -9..9_i8), 0..=CELL)
        .prop_map(|all| all.into_iter().map(|(x, y)| (x.into(), y.into())).collect::<Vec<_>>());
    let length = prop_oneof![3 => 0..=CELL, 1 => CELL..=CELLS * CELL];
    let some = (length, prop::collection::vec(pair, 1..=CELL));
    let repeated =
        some.prop_map(|(length, pairs)| pairs.into_iter().cycle().take(length).collect());
    let scale = prop_oneof![Just(0), -140..=120_i32];
    (prop_oneof![plain_only, repeated], scale).prop_map(|(pairs, scale)| {
        let scaled = |value: f64| value * 2_f64.powi(scale);
        pairs.into_iter().map(|(x, y)| (scaled(x), scaled(y))).collect()
    })
}

fn stored(dtype: DType, values: &[f64]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    narrow(Level::portable(), values, dtype, &mut bytes);
    bytes
}

/// The sums of the squares of x − y and of y, where both are finite.
fn exact(dtype: DType, out: &[u8], reference: &[u8]) -> [f64; 2] {
    let wide = |bytes: &[u8]| {
        let mut wide = vec![0.0_f64; bytes.len() / dtype.size()];
        widen(Level::portable(), dtype, bytes, &mut wide);
        wide
    };
    let (out, reference) = (wide(out), wide(reference));
    let pairs = out.into_iter().zip(reference).filter(|(x, y)| x.is_finite() && y.is_finite());
    pairs.fold([0.0, 0.0], |[d, n], (x, y)| [d + (x - y) * (x - y), n + y * y])
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn cells_are_compared_as_by_the_oracle(
        pairs in values(),
        dtype in prop::sample::select(&FLOATS[..]),
    ) {
        let (out, reference): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let (out, reference) = (stored(dtype, &out), stored(dtype, &reference));
        for reference in [None, Some(&reference[..])] {
            let expected = oracle::comparison(dtype, &out, reference);
            for level in Level::available() {
                assert_eq!(compare(level, dtype, &out, reference), expected, "{}", level.name());
            }
        }
        let found = compare(Level::detect(), dtype, &out, Some(&reference));
        let sums = [found.difference, found.norm].into_iter().zip(exact(dtype, &out, &reference));
        for (found, exact) in sums {
            assert!(found == exact || (found - exact).abs() <= ERROR * exact, "{found} for {exact}");
        }
    }
}

#[test]
fn what_is_odd_is_counted() {
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, -0.0, 1.0, 2.0];
    let reference = [f32::NAN, 1.0, f32::NEG_INFINITY, f32::MAX, 3.0, 0.0, 1.0, 2.5];
    let bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let found = compare(Level::detect(), DType::F32, &bytes(&values), Some(&bytes(&reference)));
    let largest = f64::from(f32::MAX);
    let expected = Comparison {
        nan: 1,
        infinite: 2,
        saturated: 2,
        compared: 8,
        changed: 3,
        difference: (-largest - 3.0) * (-largest - 3.0) + 0.25,
        norm: largest * largest + 9.0 + 1.0 + 6.25,
    };
    assert_eq!(found, expected);
    assert!(!found.is_finite());
    assert_eq!(found.relative_change(), Some(expected.difference.sqrt() / expected.norm.sqrt()));
}

#[test]
fn a_change_from_nothing_has_no_ratio() {
    let compared = compare(Level::detect(), DType::F32, &[0, 0, 128, 63], Some(&[0; 4]));
    assert_eq!((compared.changed, compared.relative_change()), (1, None));
    let nothing = compare(Level::detect(), DType::F32, &[0, 0, 128, 63], None);
    assert_eq!((nothing.compared, nothing.changed, nothing.relative_change()), (0, 0, None));
}

#[test]
fn a_cell_is_summed_in_the_type_that_holds_its_squares() {
    // The squares that follow the first are an eighth of its last place in f32.
    let mut values = [1.0 / 8192.0; CELL];
    values[0] = 1.0;
    let rest = 1023.0 / 67_108_864.0;
    for (dtype, scale, lost) in [
        (DType::F32, 1.0, 63.0 / 67_108_864.0),
        (DType::Bf16, 1.0, 63.0 / 67_108_864.0),
        (DType::F64, 1.0, 0.0),
        (DType::F32, 2_f64.powi(-51), 0.0),
        (DType::F32, 2_f64.powi(100), 0.0),
    ] {
        let scaled = values.map(|value| value * scale);
        let (out, reference) = (stored(dtype, &[0.0; CELL]), stored(dtype, &scaled));
        for level in Level::available() {
            let found = compare(level, dtype, &out, Some(&reference));
            let expected = (1.0 + rest - lost) * scale * scale;
            assert_eq!((found.difference, found.norm), (expected, expected), "{dtype} · {scale}");
        }
    }
}
