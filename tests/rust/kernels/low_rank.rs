use super::{config, each_level};
use oxmerge::dtype::DType;
use oxmerge::kernels::{Level, Product, Real, TILE, Tiles, low_rank_bytes, narrow, oracle, widen};
use proptest::prelude::*;

/// Types that are widened to `T`.
fn types<T>() -> Vec<DType> {
    let double = (size_of::<T>() == size_of::<f64>()).then_some(DType::F64);
    [DType::Bf16, DType::F16, DType::F32].into_iter().chain(double).collect()
}

fn stored<T: Real>(values: &[T], dtype: DType) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    narrow(Level::portable(), values, dtype, &mut bytes);
    bytes
}

/// A right factor, step by step of the rank.
fn tiles<T: Real>(rank: usize, numbers: &[T]) -> Tiles<T> {
    let columns = numbers.len() / rank;
    let mut tiles = Tiles::new(rank, columns);
    for (at, &number) in numbers.iter().enumerate() {
        tiles.put(at / columns, at % columns, number);
    }
    tiles
}

each_level! {
    /// Blocks of rows, at any column, of any products and types: each element is what the words say.
    fn low_rank_products_are_like_the_oracle<T>(level) {
        let ranks = prop::collection::vec(1..20_usize, 0..3);
        let sizes = (1..11_usize, 1..6 * TILE, 0..70 * TILE, ranks);
        let case = sizes.prop_flat_map(|(rows, width, first, ranks)| {
            let some = |count| prop::collection::vec(T::interesting(), count);
            let product = |rank: usize| (some(rows * rank), some(rank * (first + width)), some(1));
            let products: Vec<_> = ranks.into_iter().map(product).collect();
            let types = || prop::sample::select(types::<T>());
            (Just((rows, width, first)), products, some(rows * width), types(), types())
        });
        proptest!(config(48), |((sizes, products, values, from, to) in case)| {
            let (rows, width, first) = sizes;
            let base = stored(&values, from);
            let held: Vec<_> =
                products.iter().map(|(left, right, _)| tiles(left.len() / rows, right)).collect();
            let added: Vec<_> = products
                .iter()
                .zip(&held)
                .map(|((left, _, scale), right)| Product { left, right, scale: scale[0] })
                .collect();
            let mut out = vec![0; values.len() * to.size()];
            low_rank_bytes(level, (from, &base), &added, first, width, to, &mut out);

            let mut expected = values.clone();
            widen(Level::portable(), from, &base, &mut expected);
            for (left, right, scale) in &products {
                let rank = left.len() / rows;
                for (at, value) in expected.iter_mut().enumerate() {
                    let (row, column) = (at / width, first + at % width);
                    let of = |step| (left[row * rank + step], right[step * (first + width) + column]);
                    *value = oracle::low_rank(*value, scale[0], &(0..rank).map(of).collect::<Vec<_>>());
                }
            }
            prop_assert!(out == stored(&expected, to), "{level:?}: {from} to {to}");
        });
    }

    /// Panels end within a row.
    fn long_rows_are_like_the_oracle<T>(level) {
        let (rows, columns, rank) = (6, 1100, 3);
        let number = |at: usize| T::from_f64((at * 37 % 101) as f64 / 64.0 - 0.75);
        let numbers = |count: usize| (0..count).map(number).collect::<Vec<T>>();
        let (left, right, values) =
            (numbers(rows * rank), numbers(rank * columns), numbers(rows * columns));
        let (held, scale) = (tiles(rank, &right), T::from_f64(0.3));
        let product = Product { left: &left, right: &held, scale };
        let base = stored(&values, DType::F32);
        let mut out = vec![0; base.len()];
        low_rank_bytes(level, (DType::F32, &base), &[product], 0, columns, DType::F32, &mut out);
        let expected = |(at, &value): (usize, &T)| {
            let (row, column) = (at / columns, at % columns);
            let of = |step| (left[row * rank + step], right[step * columns + column]);
            oracle::low_rank(value, scale, &(0..rank).map(of).collect::<Vec<_>>())
        };
        let expected: Vec<T> = values.iter().enumerate().map(expected).collect();
        assert!(out == stored(&expected, DType::F32), "{level:?}");
    }

    /// The sum starts from the first product: starting from +0 would lose the sign.
    fn products_of_negative_zero_add_nothing<T>(level) {
        let right = tiles(2, &[T::ONE; 2 * TILE]);
        let product = Product { left: &[-T::ZERO; 2], right: &right, scale: T::ONE };
        let base = stored(&[-T::ZERO; TILE], DType::Bf16);
        let mut out = vec![0; base.len()];
        low_rank_bytes(level, (DType::Bf16, &base), &[product], 0, TILE, DType::Bf16, &mut out);
        assert_eq!(out, base, "{level:?}");
    }

    /// With a product that is rounded the small part of it would be lost.
    fn products_are_not_rounded_before_they_are_added<T>(level) {
        let epsilon = T::from_pattern(T::ONE.bits() + 1) - T::ONE;
        let above_one = T::ONE + epsilon;
        let right = tiles(2, &[above_one; 2]);
        let product = Product { left: &[-above_one, above_one], right: &right, scale: T::ONE };
        let mut out = vec![0; 4];
        low_rank_bytes(level, (DType::F32, &[0; 4]), &[product], 0, 1, DType::F32, &mut out);
        assert_eq!(out, stored(&[epsilon * epsilon], DType::F32), "{level:?}");
    }
}
