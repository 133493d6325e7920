//! Karcher mean: the point on the sphere whose squared angles to all inputs have the smallest sum,
//! scaled by the mean length.
//!
//! The mean is a sum of the inputs, so the iteration runs on their coefficients and needs nothing
//! but the inner products, in f64. mergekit iterates on the tensors in their own type, where bf16
//! leaves mostly noise. Differs from it also where an input points away from the mean: the way there
//! is not defined, and that input is left out of the step, where mergekit divides by nearly zero.

use super::gram::Gram;
use super::{Base, Class, Contract, Description, Inputs, Kind, Method, Parameter, Per, Preset};
use crate::error::Result;
use crate::formula::{Value, compute};
use crate::plan::OutputTensor;

/// A smaller sine on the opposite side means that there is no shortest way.
const OPPOSITE: f64 = 1e-6;

/// Karcher mean.
#[derive(Debug)]
pub(crate) struct Karcher;

impl Method for Karcher {
    fn description(&self) -> Description {
        Description {
            name: "karcher",
            title: "Karcher mean",
            formula: "mean of |x_i| * the unit vector u that minimises the sum of \
                      angle(u, x_i)^2; all models count alike",
            class: Class::Gram,
            cost: "two reads of every input",
            paper: "https://arxiv.org/abs/2603.04972",
            contract: Contract { base: Base::Ignored, inputs: (1, None), others: (0, None) },
            parameters: const {
                &[
                    Parameter::new(
                        Per::Shared,
                        "max_iter",
                        Kind::Int,
                        Preset::Int(10),
                        "steps at the most",
                    )
                    .at_least(0.0),
                    Parameter::new(
                        Per::Shared,
                        "tol",
                        Kind::Float,
                        Preset::Float(1e-5),
                        "steps, angles and lengths below this are none",
                    )
                    .at_least(0.0),
                ]
            },
        }
    }

    fn differs(&self) -> &'static str {
        "inner products and the iteration are in f64, where mergekit iterates in the type of \
         the tensors; an input that points away from the mean is left out of the step, where \
         mergekit divides by nearly zero"
    }

    fn formula(&self, tensor: &OutputTensor) -> Result<Value> {
        let inputs = Inputs::of(tensor);
        let (steps, tolerance) = (inputs.number("max_iter")?, inputs.number("tol")?);
        let vectors: Vec<Value> = inputs.all().into_iter().map(|input| input.value).collect();
        if let [only] = vectors.as_slice() {
            return Ok(only.clone());
        }
        let count = vectors.len();
        let coefficients = compute(&Gram::products(&vectors), count, move |products| {
            mean(&Gram::new(products, count), steps as u64, tolerance)
        });
        Ok(Value::weighted_sum(coefficients.into_iter().zip(vectors)))
    }
}

/// The coefficients of the vectors in their mean.
fn mean(gram: &Gram, steps: u64, tolerance: f64) -> Vec<f64> {
    let lengths = gram.lengths();
    let has_direction: Vec<bool> = lengths.iter().map(|&length| length > tolerance).collect();
    let valid = has_direction.iter().filter(|valid| **valid).count();
    if valid == 0 {
        return vec![0.0; lengths.len()];
    }
    let share = 1.0 / valid as f64;
    // The coefficients of unit vectors: x_i / |x_i|.
    let per_length: Vec<f64> = lengths
        .iter()
        .zip(&has_direction)
        .map(|(length, valid)| if *valid { 1.0 / length } else { 0.0 })
        .collect();
    let mut point: Vec<f64> = per_length.iter().map(|unit| share * unit).collect();
    let length = gram.square(&point).max(0.0).sqrt();
    if length < tolerance {
        let first = has_direction.iter().position(|valid| *valid).unwrap_or(0);
        point = vec![0.0; lengths.len()];
        point[first] = per_length[first];
    } else {
        point.iter_mut().for_each(|c| *c /= length);
    }
    for _ in 0..steps {
        let step = tangent(gram, &point, &per_length, share, tolerance);
        let size = gram.square(&step).max(0.0).sqrt();
        if size < tolerance {
            break;
        }
        let (stay, go) = (libm::cos(size), libm::sin(size) / size);
        for (c, toward) in point.iter_mut().zip(&step) {
            *c = stay * *c + go * toward;
        }
        let length = gram.square(&point).max(0.0).sqrt();
        if length > tolerance {
            point.iter_mut().for_each(|c| *c /= length);
        }
    }
    let scale = lengths.iter().sum::<f64>() / lengths.len() as f64;
    point.into_iter().map(|c| scale * c).collect()
}

/// The mean of the ways from `point` to the unit vectors.
fn tangent(gram: &Gram, point: &[f64], per_length: &[f64], share: f64, tolerance: f64) -> Vec<f64> {
    let mut step = vec![0.0; point.len()];
    let products = gram.times(point);
    for (index, unit) in per_length.iter().enumerate().filter(|(_, unit)| **unit > 0.0) {
        let cosine = (products[index] * unit).clamp(-1.0, 1.0);
        let angle = libm::acos(cosine);
        let sine = libm::sin(angle);
        if angle < tolerance || sine < OPPOSITE {
            continue;
        }
        let factor = share * angle / sine;
        step[index] += factor * unit;
        for (step, c) in step.iter_mut().zip(point) {
            *step -= factor * cosine * c;
        }
    }
    step
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that fails may panic")]
mod tests {
    use super::{Gram, mean};

    #[test]
    fn the_mean_of_right_angles_is_between_them() {
        let [a, b] = mean(&Gram::new(&[4.0, 0.0, 4.0], 2), 10, 1e-5).try_into().unwrap();
        assert!((a - 0.5_f64.sqrt()).abs() < 1e-12 && (a - b).abs() < 1e-12, "{a} {b}");
    }

    #[test]
    fn opposite_vectors_and_zeros_do_not_blow_up() {
        let [a, b] = mean(&Gram::new(&[4.0, -4.0, 4.0], 2), 10, 1e-5).try_into().unwrap();
        assert!((a - 1.0).abs() < 1e-12 && b == 0.0, "{a} {b}");
        assert_eq!(mean(&Gram::new(&[0.0, 0.0, 0.0], 2), 10, 1e-5), [0.0, 0.0]);
        let [a, b] = mean(&Gram::new(&[4.0, 0.0, 0.0], 2), 10, 1e-5).try_into().unwrap();
        assert!((a - 0.5).abs() < 1e-12 && b == 0.0, "{a} {b}");
    }

    #[test]
    fn three_vectors_are_as_near_as_can_be() {
        // Two equal, one at a right angle: the angle from the pair is a third of the whole.
        let [a, b, c] =
            mean(&Gram::new(&[1.0, 1.0, 0.0, 1.0, 0.0, 1.0], 3), 100, 1e-12).try_into().unwrap();
        let angle = libm::atan2(c, a + b);
        assert!((angle - std::f64::consts::FRAC_PI_6).abs() < 1e-9, "{angle}");
    }
}
