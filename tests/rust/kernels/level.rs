use oxmerge::kernels::Level;

#[test]
fn the_best_level_is_the_last_available() {
    assert_eq!(Level::available().last(), Some(&Level::detect()), "detect and available disagree");
    assert_eq!(Level::available()[0], Level::portable(), "every CPU has the portable level");
}

#[test]
fn available_levels_can_be_forced_by_name() {
    for level in Level::available() {
        assert_eq!(Level::forced(level.name()).ok(), Some(level), "forcing {}", level.name());
    }
}

#[test]
fn an_unavailable_level_names_those_that_are_available() {
    let error = Level::forced("sse9").expect_err("no CPU has it").to_string();
    assert!(error.contains("`sse9`"), "must name what was asked for: {error}");
    for level in Level::available() {
        assert!(error.contains(level.name()), "must name {}: {error}", level.name());
    }
}
