use super::{assert_same, config, each_level};
use oxmerge::kernels::{TILE, Tiles, low_rank_into, oracle};
use proptest::prelude::*;

each_level! {
    /// Blocks of rows, at any column, of any rank: each element is what the words say.
    fn low_rank_products_are_like_the_oracle<T>(level) {
        let sizes = (1..7_usize, 1..4 * TILE + 3, 0..3 * TILE, 1..20_usize);
        let case = sizes.prop_flat_map(|(rows, width, first, rank)| {
            let some = |count| prop::collection::vec(T::interesting(), count);
            let (left, right) = (some(rows * rank), some(rank * (first + width)));
            (Just((rows, width, first, rank)), left, right, T::interesting(), some(rows * width))
        });
        proptest!(config(64), |((sizes, left, right, scale, values) in case)| {
            let (_, width, first, rank) = sizes;
            let columns = first + width;
            let mut tiles = Tiles::new(rank, columns);
            for (at, &number) in right.iter().enumerate() {
                tiles.put(at / columns, at % columns, number);
            }
            let mut out = values.clone();
            low_rank_into(level, &left, &tiles, first, width, scale, &mut out);
            let expected: Vec<T> = values
                .iter()
                .enumerate()
                .map(|(at, &value)| {
                    let (row, column) = (at / width, first + at % width);
                    let products = (0..rank)
                        .map(|step| (left[row * rank + step], right[step * columns + column]));
                    oracle::low_rank(value, scale, &products.collect::<Vec<_>>())
                })
                .collect();
            assert_same(level, &out, &expected);
        });
    }

    /// The sum starts from the first product: starting from +0 would lose the sign.
    fn products_of_negative_zero_add_nothing<T>(level) {
        let mut tiles = Tiles::new(2, TILE);
        (0..TILE).for_each(|column| (0..2).for_each(|step| tiles.put(step, column, T::ONE)));
        let mut out = [-T::ZERO; TILE];
        low_rank_into(level, &[-T::ZERO; 2], &tiles, 0, TILE, T::ONE, &mut out);
        assert_same(level, &out, &[-T::ZERO; TILE]);
    }
}
