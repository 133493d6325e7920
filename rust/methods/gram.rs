//! Inner products of some vectors, and what follows from them for sums of those vectors.

use crate::formula::{Scalar, Scope, Value};

/// The inner products of vectors with each other.
#[derive(Debug)]
pub(super) struct Gram {
    count: usize,
    /// Row by row, the lower triangle filled in.
    products: Vec<f64>,
}

impl Gram {
    /// What has to be reduced over the whole tensor, in the order that [`Gram::new`] takes.
    pub(super) fn products(vectors: &[Value]) -> Vec<Scalar> {
        Self::products_over(vectors, Scope::Tensor)
    }

    /// The same over `scope`.
    pub(super) fn products_over(vectors: &[Value], scope: Scope) -> Vec<Scalar> {
        let row = |first: usize| {
            let rest = vectors[first..].iter();
            rest.map(move |other| vectors[first].dot(other, scope))
        };
        (0..vectors.len()).flat_map(row).collect()
    }

    /// From the products of each of `count` vectors with itself and those behind it.
    pub(super) fn new(upper: &[f64], count: usize) -> Self {
        let mut products = vec![0.0; count * count];
        let mut upper = upper.iter();
        for row in 0..count {
            for column in row..count {
                let product = *upper.next().expect("a product for each pair");
                products[row * count + column] = product;
                products[column * count + row] = product;
            }
        }
        Self { count, products }
    }

    /// The product of two of the vectors.
    pub(super) fn at(&self, row: usize, column: usize) -> f64 {
        self.products[row * self.count + column]
    }

    /// The length of each vector.
    pub(super) fn lengths(&self) -> Vec<f64> {
        (0..self.count).map(|index| self.at(index, index).max(0.0).sqrt()).collect()
    }

    /// The products of Σ cᵢ·xᵢ with each vector.
    pub(super) fn times(&self, coefficients: &[f64]) -> Vec<f64> {
        let row = |row: usize| {
            let products = coefficients.iter().enumerate();
            products.map(|(column, c)| c * self.at(row, column)).sum()
        };
        (0..self.count).map(row).collect()
    }

    /// The squared length of Σ cᵢ·xᵢ.
    pub(super) fn square(&self, coefficients: &[f64]) -> f64 {
        self.times(coefficients).iter().zip(coefficients).map(|(product, c)| product * c).sum()
    }
}
