//! Programs that run others' code from one place of their own: there the line of code is not in the stack.

const INTERPRETERS: &[&str] =
    &["python", "libpython", "bash", "dash", "sh", "zsh", "perl", "node", "ruby", "libruby", "php", "lua"];

/// Whether the file of a program or library is such a one, by its path.
#[must_use]
pub(super) fn is_interpreter(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    let is_one =
        |name: &str| file.strip_prefix(name).is_some_and(|rest| !rest.starts_with(char::is_alphabetic));
    INTERPRETERS.iter().any(|name| is_one(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_belongs_to_the_name_and_another_word_does_not() {
        for path in ["/usr/bin/python3.11", "/bin/bash", "/usr/lib/libpython3.11.so.1.0", "node"] {
            assert!(is_interpreter(path), "{path}");
        }
        for path in ["/usr/bin/shred", "/usr/bin/nodetool", "", "/usr/lib/libc.so.6"] {
            assert!(!is_interpreter(path), "{path}");
        }
    }
}
