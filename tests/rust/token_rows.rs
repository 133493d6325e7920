//! Which row of a model stands for which token: the maps against the rules in words.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oxmerge::checkpoint::token_rows::{Filling, TokenRows, find_token, tokens_of};
use oxmerge::plan::{Origin, RowMap};
use proptest::prelude::*;
use tempfile::TempDir;

/// A vocabulary as people see it: the token of each id.
type Tokens = BTreeMap<u64, String>;

/// Writes a `tokenizer.json` with these tokens, of which those from `added` on were added.
fn write(folder: &TempDir, name: &str, tokens: &Tokens, added: u64) -> Vec<PathBuf> {
    let vocabulary: serde_json::Map<_, _> = tokens
        .iter()
        .filter(|(id, _)| **id < added)
        .map(|(id, token)| (token.clone(), (*id).into()))
        .collect();
    let marked: Vec<_> = tokens
        .iter()
        .filter(|(id, _)| **id >= added)
        .map(|(id, token)| serde_json::json!({ "id": id, "content": token }))
        .collect();
    let text = serde_json::json!({ "added_tokens": marked, "model": { "vocab": vocabulary } });
    let path = folder.path().join(format!("{name}.json"));
    std::fs::write(&path, text.to_string()).unwrap();
    vec![path]
}

/// Each row of a map by itself.
fn spelt_out(map: &RowMap) -> Vec<Origin> {
    let each = map.runs().flat_map(|(rows, origin)| {
        rows.clone().map(move |row| match origin {
            Origin::Part { part, first } => {
                Origin::Part { part: *part, first: first + (row - rows.start) as u32 }
            }
            other => other.clone(),
        })
    });
    each.collect()
}

/// What input `column` has in row `row`, by the rules.
fn ruled(
    output: &Tokens,
    models: &[(Tokens, u64)],
    base: Option<usize>,
    column: usize,
    row: u64,
) -> Origin {
    let own = |model: usize| -> Option<u32> {
        let (tokens, rows) = &models[model];
        let found = match output.get(&row) {
            Some(token) => tokens.iter().find(|(id, own)| *id < rows && *own == token),
            None if row < *rows && !tokens.contains_key(&row) => return Some(row as u32),
            None => None,
        };
        found.map(|(id, _)| *id as u32)
    };
    let part = |model: usize| own(model).map(|first| Origin::Part { part: model as u32, first });
    let having: Vec<usize> = (0..models.len()).filter(|&model| own(model).is_some()).collect();
    part(column).unwrap_or_else(|| match (&having[..], base.and_then(part)) {
        ([], _) => Origin::Zero,
        ([only], _) => part(*only).unwrap(),
        (_, Some(of_base)) => of_base,
        (several, None) => {
            Origin::Mean(several.iter().map(|&m| (m as u32, own(m).unwrap())).collect())
        }
    })
}

/// A vocabulary of some of thirty tokens, at some ids, and how many rows its model has.
fn vocabulary() -> impl Strategy<Value = (Tokens, u64)> {
    let tokens = prop::collection::btree_map(0..30u64, 0..40u8, 0..25).prop_map(|by_id| {
        let mut seen = std::collections::HashSet::new();
        let new = by_id.into_iter().filter(|(_, token)| seen.insert(*token));
        new.map(|(id, token)| (id, format!("t{token}"))).collect::<Tokens>()
    });
    (tokens, 0..40u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn maps_follow_the_rules(
        output in vocabulary(),
        models in prop::collection::vec(vocabulary(), 1..4),
        base in 0..4usize,
        added in 0..30u64,
        more in 0..5u64,
    ) {
        let folder = TempDir::new().unwrap();
        let (tokens, limit) = output;
        let base = (base < models.len()).then_some(base);
        let files = write(&folder, "output", &tokens, added);
        let each: Vec<_> = models
            .iter()
            .enumerate()
            .map(|(at, (tokens, rows))| (write(&folder, &at.to_string(), tokens, added), *rows))
            .collect();
        let mut rows = TokenRows::read(&files, limit, &each, base).unwrap();
        let tokens: Tokens = tokens.into_iter().filter(|(id, _)| *id < limit).collect();
        let needed = tokens.keys().next_back().map_or(0, |last| last + 1);
        prop_assert_eq!(rows.rows(), needed);
        rows.resize(needed + more, false).unwrap();
        let columns: Vec<usize> = (0..models.len()).collect();
        for column in 0..models.len() {
            let map = rows.map(&columns, column).unwrap();
            let expected: Vec<_> = (0..needed + more)
                .map(|row| ruled(&tokens, &models, base, column, row))
                .collect();
            prop_assert_eq!(spelt_out(&map), expected);
            let lacking = tokens.keys().filter(|&&row| rows.row(column, row).is_none()).count();
            prop_assert_eq!(rows.lacking(column), lacking);
            let (theirs, limit) = &models[column];
            let foreign = theirs.iter().filter(|(id, token)| {
                *id < limit && !tokens.values().any(|own| own == *token)
            });
            prop_assert_eq!(rows.foreign(column), foreign.count());
        }
    }
}

fn tokens(each: &[(u64, &str)]) -> Tokens {
    each.iter().map(|&(id, token)| (id, token.to_owned())).collect()
}

#[test]
fn single_rows_are_filled_as_told() {
    let folder = TempDir::new().unwrap();
    let output = write(&folder, "o", &tokens(&[(0, "a"), (1, "b"), (2, "c"), (3, "d")]), 9);
    let one = write(&folder, "x", &tokens(&[(0, "a"), (1, "b")]), 9);
    let other = write(&folder, "y", &tokens(&[(5, "a"), (6, "c")]), 9);
    let mut rows = TokenRows::read(&output, 9, &[(one, 2), (other, 7)], None).unwrap();
    rows.fill(0, Filling::Model(1), true);
    rows.fill(1, Filling::Zero, false);
    rows.fill(3, Filling::Row(1, 4), false);
    rows.resize(6, true).unwrap();
    let part = |part, first| Origin::Part { part, first };
    let map = |column| spelt_out(&rows.map(&[0, 1], column).unwrap());
    let rest = [Origin::MeanAbove, Origin::MeanAbove];
    assert_eq!(map(0), [&[part(1, 5), part(0, 1), part(1, 6), part(1, 4)], &rest[..]].concat());
    assert_eq!(map(1), [&[part(1, 5), Origin::Zero, part(1, 6), part(1, 4)], &rest[..]].concat());
    // Of a tensor that is not made of that model.
    assert!(rows.map(&[0], 0).is_err());
    assert!(rows.resize(3, true).is_err());
    assert!(rows.resize(u64::MAX, false).is_err());
}

#[test]
fn added_tokens_stand_before_others() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tokenizer.json");
    let text = r#"{"model": {"vocab": {"a": 0, "b": 1, "c": 2}},
                   "added_tokens": [{"id": 1, "content": "x"}, {"id": 4, "content": "a"}]}"#;
    std::fs::write(&path, text).unwrap();
    let files = vec![path];
    let found = tokens_of(&files, &[0, 1, 2, 3, 4]).unwrap();
    let expected = [(0, "a"), (1, "x"), (2, "c"), (4, "a")];
    assert_eq!(found, expected.map(|(id, token)| (id, token.to_owned())).into());
    assert_eq!(find_token(&files, "a").unwrap(), Some(4));
    assert_eq!(find_token(&files, "z").unwrap(), None);
    let rows = TokenRows::read(&files, 9, &[(files.clone(), 9)], None).unwrap();
    assert_eq!((rows.find("a"), rows.find("b"), rows.find("x")), (Some(4), None, Some(1)));
    let map = rows.map(&[0], 0).unwrap();
    // Row 0 is that of a token which text never becomes, row 3 that of none.
    assert!(map.is_whole(0, 5));
}
