//! What a thread is for, by its name: `tokio-runtime-w-12` is a `tokio-runtime-w`.

/// The name without the number that tells threads of one type apart, and without what joins it to the name. A name
/// that is nothing but a number is its own type.
#[must_use]
pub(crate) fn thread_type(name: &str) -> &str {
    let joints = ['-', '_', ':', '/', '#', '.', ' ', '[', ']', '(', ')'];
    let mut kept = name;
    loop {
        let bare = kept.trim_end_matches(joints);
        let shorter = bare.trim_end_matches(|letter: char| letter.is_ascii_digit());
        if shorter.is_empty() || (shorter.len() == bare.len() && bare.len() == kept.len()) {
            break;
        }
        kept = if shorter.len() == bare.len() { bare } else { shorter };
    }
    let kept = kept.trim_end_matches(joints);
    if kept.is_empty() { name } else { kept }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_at_the_end_are_not_part_of_the_type() {
        for (name, expected) in [
            ("tokio-runtime-w-12", "tokio-runtime-w"),
            ("tokio-runtime-w", "tokio-runtime-w"),
            ("worker 3", "worker"),
            ("pool-1-thread-7", "pool-1-thread"),
            ("GC Thread#4", "GC Thread"),
            ("C2 CompilerThre", "C2 CompilerThre"),
            ("kworker/0:1", "kworker"),
            ("bg_flush[12]", "bg_flush"),
            ("grpc_2_5", "grpc"),
            ("worker12", "worker"),
            ("1234", "1234"),
            ("", ""),
        ] {
            assert_eq!(thread_type(name), expected, "{name}");
        }
    }

    proptest! {
        #[test]
        fn a_type_is_a_beginning_of_the_name_and_its_own_type(name in ".{0,20}") {
            let found = thread_type(&name);
            prop_assert!(name.starts_with(found));
            prop_assert_eq!(thread_type(found), found);
        }
    }
}
