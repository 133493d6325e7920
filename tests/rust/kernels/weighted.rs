use super::{LENGTHS, TestReal, assert_bits, assert_same, config, each_level, misaligned};
use oxmerge::dtype::DType;
use oxmerge::kernels::{
    BinaryOp, Level, Operand, binary, narrow, oracle, weighted_difference_sum_bytes, weighted_sum,
    weighted_sum_bytes, widen,
};
use proptest::prelude::*;

const STORED: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

each_level! {
    fn weighted_sum_is_like_the_oracle<T>(level) {
        let terms = (1..10_usize, prop::sample::select(&LENGTHS[..])).prop_flat_map(|(count, length)| {
            let input = prop::collection::vec(T::interesting(), length);
            prop::collection::vec((T::interesting(), input), count)
        });
        proptest!(config(48), |(terms in terms)| {
            let slices: Vec<(T, &[T])> = terms.iter().map(|(c, x)| (*c, &x[..])).collect();
            let mut out = vec![T::ONE; slices[0].1.len()];
            weighted_sum(level, &slices, &mut out);
            let expected: Vec<T> = (0..out.len())
                .map(|i| oracle::weighted_sum(&slices.iter().map(|(c, x)| (*c, x[i])).collect::<Vec<_>>()))
                .collect();
            assert_same(level, &out, &expected);
        });
    }

    /// With a fused multiply-add the small part of the product would survive.
    fn products_are_rounded_before_they_are_added<T>(level) {
        let epsilon = T::from_pattern(T::ONE.bits() + 1) - T::ONE;
        let above_one = T::ONE + epsilon;
        let minus_square = -(above_one * above_one);
        let (ones, values) = (vec![T::ONE; 40], vec![above_one; 40]);
        let mut out = vec![T::ONE; 40];
        weighted_sum(level, &[(minus_square, &ones), (above_one, &values)], &mut out);
        assert_same(level, &out, &[T::ZERO; 40]);
    }

    /// The sum starts from the first product: starting from +0 would lose the sign.
    fn negative_zeros_sum_to_negative_zero<T>(level) {
        let zeros = vec![-T::ZERO; 40];
        for count in 1..10 {
            let mut out = vec![T::ONE; 40];
            weighted_sum(level, &vec![(T::ONE, &zeros[..]); count], &mut out);
            assert_bits(level, &out, &zeros);
        }
    }
}

/// Random stored inputs: a coefficient, a type and patterns, all of one length.
#[derive(Debug)]
struct Inputs {
    count: usize,
    terms: Vec<(f32, DType, Vec<u8>)>,
    output: DType,
    scale: f32,
}

impl Inputs {
    fn any() -> impl Strategy<Value = Self> {
        let dtype = || prop::sample::select(&STORED[..]);
        let uniform = (dtype(), 1..7_usize).prop_map(|(dtype, terms)| vec![dtype; terms + 1]);
        let mixed = prop::collection::vec(dtype(), 2..8);
        let scale = prop_oneof![Just(1.0_f32), Just(0.3), f32::interesting()];
        let length = prop_oneof![prop::sample::select(&LENGTHS[..]), 0..2500_usize];
        (prop_oneof![uniform, mixed], length, scale, any::<u64>()).prop_map(
            |(mut dtypes, count, scale, seed)| {
                let output = dtypes.pop().expect("at least two");
                let terms = dtypes.into_iter().zip(seed..);
                let terms = terms.map(|(dtype, seed)| Self::term(dtype, count, seed)).collect();
                Self { count, terms, output, scale }
            },
        )
    }

    /// Weights as they come, about one in sixteen of any bits at all.
    fn term(dtype: DType, count: usize, seed: u64) -> (f32, DType, Vec<u8>) {
        let mut state = seed;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 29) ^ (state >> 3)
        };
        let bytes = (0..count).flat_map(|_| {
            let weight = ((random() & 0xFFFF) as f32 - 32768.0) / 1e6;
            let bits = random();
            let any = &bits.to_le_bytes()[..dtype.size()];
            if (bits >> 40) % 16 == 0 { any.to_vec() } else { oracle::narrow(dtype, weight) }
        });
        let bytes = bytes.collect();
        (((random() & 0xFF) as f32 - 100.0) / 128.0, dtype, bytes)
    }

    /// Runs with every input and the output misaligned.
    fn run(&self, f: impl FnOnce(&[(f32, DType, &[u8])], &mut [u8])) -> Vec<u8> {
        let moved: Vec<_> = self.terms.iter().map(|term| misaligned(&term.2)).collect();
        let terms: Vec<_> = self
            .terms
            .iter()
            .zip(&moved)
            .map(|(&(coefficient, dtype, _), bytes)| (coefficient, dtype, &bytes[1..]))
            .collect();
        let mut out = vec![0; 1 + self.count * self.output.size()];
        f(&terms, &mut out[1..]);
        out.split_off(1)
    }

    fn wide(&self, level: Level) -> Vec<(f32, Vec<f32>)> {
        let widened = self.terms.iter().map(|(coefficient, dtype, bytes)| {
            let mut wide = vec![0.0; self.count];
            widen(level, *dtype, bytes, &mut wide);
            (*coefficient, wide)
        });
        widened.collect()
    }

    fn narrowed(&self, level: Level, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.output.size()];
        narrow(level, values, self.output, &mut bytes);
        bytes
    }
}

#[test]
fn the_fused_sum_is_widen_then_sum_then_narrow() {
    for level in Level::available() {
        proptest!(config(96), |(inputs in Inputs::any())| {
            let fused = inputs.run(|terms, out| weighted_sum_bytes(level, terms, inputs.output, out));
            let wide = inputs.wide(level);
            let terms: Vec<_> = wide.iter().map(|(c, x)| (*c, &x[..])).collect();
            let mut sum = vec![0.0; inputs.count];
            weighted_sum(level, &terms, &mut sum);
            prop_assert_eq!(fused, inputs.narrowed(level, &sum), "at {}", level.name());
        });
    }
}

/// base + scale·(c₀·(x₀ − base) + …) by the elementwise kernels.
fn difference_sum(level: Level, base: &[f32], terms: &[(f32, Vec<f32>)], scale: f32) -> Vec<f32> {
    let apply = |op, a: &[f32], b: Operand<'_, f32>| {
        let mut out = vec![0.0; a.len()];
        binary(level, op, Operand::Slice(a), b, &mut out);
        out
    };
    let mut sum: Option<Vec<f32>> = None;
    for (coefficient, x) in terms {
        let difference = apply(BinaryOp::Sub, x, Operand::Slice(base));
        let product = apply(BinaryOp::Mul, &difference, Operand::Scalar(*coefficient));
        sum =
            Some(sum.map_or(product.clone(), |sum| {
                apply(BinaryOp::Add, &sum, Operand::Slice(&product))
            }));
    }
    let mut sum = sum.expect("a term");
    if scale.to_bits() != 1.0_f32.to_bits() {
        sum = apply(BinaryOp::Mul, &sum, Operand::Scalar(scale));
    }
    apply(BinaryOp::Add, base, Operand::Slice(&sum))
}

#[test]
fn the_fused_difference_is_the_unfused_one() {
    for level in Level::available() {
        proptest!(config(96), |(inputs in Inputs::any(), base_dtype in prop::sample::select(&STORED[..]), same in any::<bool>(), seed in any::<u64>())| {
            let base_dtype = if same { inputs.output } else { base_dtype };
            let base = Inputs::term(base_dtype, inputs.count, seed).2;
            let fused = inputs.run(|terms, out| {
                let base = misaligned(&base);
                let base = (base_dtype, &base[1..]);
                weighted_difference_sum_bytes(level, base, terms, inputs.scale, inputs.output, out);
            });
            let mut wide = vec![0.0; inputs.count];
            widen(level, base_dtype, &base, &mut wide);
            let unfused = difference_sum(level, &wide, &inputs.wide(level), inputs.scale);
            prop_assert_eq!(&fused, &inputs.narrowed(level, &unfused), "at {}", level.name());
            let terms = inputs.wide(level);
            let by_oracle: Vec<u8> = (0..inputs.count).flat_map(|i| {
                let terms: Vec<_> = terms.iter().map(|(c, x)| (*c, x[i])).collect();
                oracle::narrow(inputs.output, oracle::weighted_difference_sum(wide[i], &terms, inputs.scale))
            }).collect();
            prop_assert_eq!(fused, by_oracle, "at {}", level.name());
        });
    }
}

#[test]
#[should_panic(expected = "a term to start from")]
fn a_sum_needs_a_term() {
    weighted_sum(Level::portable(), &[], &mut [0.0_f32]);
}
