//! The bindings: what Python hands over becomes the engine's, and what comes of it Python's.
//!
//! What they decide besides is how a call runs: on which thread and how many (`enter`, `merge`), and
//! into which memory (`arrays`).

#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

mod arrays;
mod assembly;
mod checkpoint;
mod digests;
mod enter;
mod error;
mod exported;
mod floats;
mod formula;
mod lend;
mod measuring;
mod merge;
mod plan;
mod spool;
mod torch;

use pyo3::prelude::*;

/// The compiled half of oxmerge.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    use super::{error, to_python};

    #[pymodule_export]
    use super::arrays::{
        OnDemand, fill_array, fill_arrays, merge_arrays, numbers_of_arrays, ulp_distance,
    };
    #[pymodule_export]
    use super::assembly::{Assembly, Fates, Run, TokenRows, find_token, largest_token, tokens_of};
    #[pymodule_export]
    use super::checkpoint::{
        Checkpoint, FileMap, Shard, TensorInfo, compare_vocabularies, index_json, open_checkpoint,
        weight_files,
    };
    #[pymodule_export]
    use super::digests::Digests;
    #[pymodule_export]
    use super::measuring::{compare_outputs, hash_tensors, measure};
    #[pymodule_export]
    use super::merge::{
        check_unchanged, execute, is_remote, journal_key, methods, modifiers, partial_name,
        peak_memory, predict, rehearse,
    };
    #[pymodule_export]
    use super::plan::Plan;
    #[pymodule_export]
    use super::spool::Spool;

    /// Version, build profile, SIMD level in use and levels of this CPU.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let level = crate::kernels::Level::from_environment().map_err(|e| error::raise(py, &e))?;
        let available = crate::kernels::Level::available();
        let info = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
            "simd": level.name(),
            "simd_available": available.iter().map(|level| level.name()).collect::<Vec<_>>(),
            "plan_version": crate::plan::PLAN_VERSION,
            "generator_version": crate::kernels::GENERATOR_VERSION,
            "reduction_version": crate::kernels::REDUCTION_VERSION,
            "comparison_version": crate::kernels::COMPARISON_VERSION,
        });
        to_python(py, &info)
    }
}

/// Plain data as Python objects, by way of JSON.
fn to_python<'py>(py: Python<'py>, value: &impl serde::Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value)
        .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))?;
    py.import("json")?.call_method1("loads", (text,))
}
