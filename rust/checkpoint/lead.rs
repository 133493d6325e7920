//! Which tensors are of one layer, as far as their names tell.

/// No longer than any count of layers: a stranger's name may have thousands of digits.
const MOST_DIGITS: usize = 9;

/// The part of a name up to its first number between dots, as `model.layers.3`; nothing if there is
/// none. `_NUMBER` in `python/oxmerge/models/names.py` reads the same number.
pub fn lead(name: &str) -> &str {
    let mut start = 0;
    for part in name.split('.') {
        let end = start + part.len();
        if is_number(part) {
            return &name[..end];
        }
        start = end + 1;
    }
    ""
}

fn is_number(part: &str) -> bool {
    let is_digits = part.bytes().all(|byte| byte.is_ascii_digit());
    let is_plain = part == "0" || !part.starts_with('0');
    is_digits && is_plain && (1..=MOST_DIGITS).contains(&part.len())
}
