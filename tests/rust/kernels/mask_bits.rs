use super::{LENGTHS, each_level};
use oxmerge::kernels::{BITS, pack_mask, unpack_mask};

each_level! {
    /// Every element by itself, where the words have just enough room and where they have more.
    fn masks_come_back<T>(level) {
        for length in LENGTHS {
            let mask: Vec<T> = (0..length).map(|at| T::truth(at * at % 7 < 3)).collect();
            let least = length.div_ceil(BITS);
            for count in [least, least + 1, 64.max(least)] {
                let mut words = vec![u32::MAX; count];
                pack_mask(level, &mask, &mut words);
                for (at, &value) in mask.iter().enumerate() {
                    let bit = words[at % count] >> (at / count) & 1;
                    assert_eq!(bit == 1, value == T::ONE, "element {at} of {length}");
                }
                let mut again = vec![T::NAN; length];
                unpack_mask(level, &words, &mut again);
                assert_eq!(again, mask);
                let part = length / 2;
                unpack_mask(level, &words, &mut again[..part]);
                assert_eq!(again[..part], mask[..part]);
            }
        }
    }
}
