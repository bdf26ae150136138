//! Where plumb says that the leaked items came from, against the sources.

use serde::Deserialize;

use crate::manifest::{Case, Leak, Place};

/// The part of what was made since watching began that must have the expected stack.
const LEAST: f64 = 0.99;

/// As in `plumb leaks -o json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Origin {
    live: u32,
    syscall: String,
    function: Option<Function>,
    stack: Vec<Function>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Function {
    function: Option<String>,
    file: Option<String>,
    line: Option<u32>,
    module: Option<String>,
}

impl Function {
    /// Whether it is this function. It may be named with the crate, package, class or namespace that it is in.
    fn is(&self, wanted: &str) -> bool {
        let Some(name) = &self.function else { return false };
        let plain = name.split_once('(').map_or(name.as_str(), |(head, _)| head);
        let within = |name: &str| {
            name.strip_suffix(wanted).is_some_and(|outer| outer.ends_with("::") || outer.ends_with('.'))
        };
        name == wanted || plain == wanted || within(plain)
    }

    /// As `is`, of a function of libc under any of its names.
    fn is_native(&self, wanted: &str) -> bool {
        let name = self.function.as_deref().unwrap_or_default().trim_start_matches('_');
        self.is(wanted) || name.strip_suffix("64").unwrap_or(name) == wanted
    }

    fn is_in(&self, files: &[String]) -> bool {
        self.file.as_deref().is_some_and(|file| files.iter().any(|own| own == base(file)))
    }
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// How many items have an origin, and how many of them the right one.
pub(crate) fn share(case: &Case, leak: &Leak, origins: &[Origin]) -> (u32, u32) {
    let live = |origins: &mut dyn Iterator<Item = &Origin>| origins.map(|origin| origin.live).sum();
    (live(&mut origins.iter()), live(&mut origins.iter().filter(|origin| is_right(case, leak, origin))))
}

fn is_right(case: &Case, leak: &Leak, origin: &Origin) -> bool {
    if leak.native.is_empty() {
        let files = case.files();
        let own: Vec<_> = origin.stack.iter().filter(|function| function.is_in(&files)).collect();
        let is_it = |(function, wanted): (&&Function, &String)| function.is(wanted);
        return own.windows(leak.stack.len()).any(|part| part.iter().zip(&leak.stack).all(is_it));
    }
    let mut rest = origin.stack.iter();
    leak.native.iter().all(|wanted| rest.any(|function| function.is_native(wanted)))
}

/// What is wrong with where it is said to leak.
pub(crate) fn faults(case: &Case, leak: &Leak, origins: &[Origin]) -> Vec<String> {
    let (all, right) = share(case, leak, origins);
    let mut faults = Vec::new();
    if all == 0 || f64::from(right) < f64::from(all) * LEAST {
        let other = origins.iter().find(|origin| !is_right(case, leak, origin));
        let other = other.map(|origin| {
            format!(", but {} by {} of {}", origin.live, origin.syscall, words_of_stack(&origin.stack))
        });
        faults.push(format!("{right} of {all} have the right origin{}", other.unwrap_or_default()));
    }
    let headline = origins.first().and_then(|origin| origin.function.as_ref());
    let is_right = headline.is_some_and(|function| match (leak.native.is_empty(), case.place(leak)) {
        (true, Some(Place { file, line })) => {
            function.is(&leak.stack[0])
                && function.file.as_deref().map(base) == Some(&*file)
                && function.line == Some(line)
        }
        (true, None) => false,
        // Not the wrapper of the call in libc.
        (false, _) => function.module.as_deref().is_some_and(|path| !base(path).starts_with("libc.so")),
    });
    if all > 0 && !is_right {
        faults.push(format!("the origin is said to be {}", headline.map_or("nothing".to_owned(), words)));
    }
    faults
}

/// The headline of the most frequent origin, for the table.
pub(crate) fn headline(origins: &[Origin]) -> String {
    let function = origins.first().and_then(|origin| origin.function.as_ref());
    function.map_or("-".to_owned(), words)
}

fn words(function: &Function) -> String {
    let name = function.function.as_deref().unwrap_or("?");
    match (&function.file, function.line, &function.module) {
        (Some(file), Some(line), _) => format!("{name} ({}:{line})", base(file)),
        (_, _, Some(module)) => format!("{name} in {}", base(module)),
        _ => name.to_owned(),
    }
}

fn words_of_stack(stack: &[Function]) -> String {
    if stack.is_empty() {
        "no stack".to_owned()
    } else {
        stack.iter().map(words).collect::<Vec<_>>().join(" < ")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::manifest::{self, Label};

    fn with_leak<T>(name: &str, test: impl FnOnce(&Case, &Leak) -> T) -> T {
        let case = manifest::read().into_iter().find(|case| case.name() == name).unwrap();
        let Label::Leak(leak) = &case.label else { panic!("{name} is sound") };
        test(&case, leak)
    }

    fn own(name: &str, file: &str, line: u32) -> Function {
        Function {
            function: Some(name.to_owned()),
            file: Some(format!("/src/{file}")),
            line: Some(line),
            module: Some("/bin/program".to_owned()),
        }
    }

    fn native(name: &str, module: &str) -> Function {
        Function { function: Some(name.to_owned()), module: Some(module.to_owned()), ..Function::default() }
    }

    /// So many items with the origin that a case ought to have.
    pub(crate) fn right(case: &Case, live: u32) -> Vec<Origin> {
        let Label::Leak(leak) = &case.label else { return Vec::new() };
        let line = |place: Option<Place>| place.map_or(1, |place| place.line);
        let file = |place: Option<Place>| place.map_or("?".to_owned(), |place| place.file);
        let (file, line) = (file(case.place(leak)), line(case.place(leak)));
        let mut stack = vec![native("open64", "/lib/libc.so.6"), own(&leak.stack[0], &file, line)];
        let source = case.source().file_name().unwrap().to_str().unwrap().to_owned();
        stack.extend(leak.stack[1..].iter().map(|function| own(function, &source, 1)));
        vec![Origin { live, syscall: "openat".to_owned(), function: Some(stack[1].clone()), stack }]
    }

    #[test]
    fn what_is_right_by_the_sources_is_right() {
        for name in ["db_retry", "slow_reader", "epoll_clients", "late_leak", "open_reachable"] {
            with_leak(name, |case, leak| {
                let origins = right(case, 40);
                assert_eq!(share(case, leak, &origins), (40, 40), "{name}");
                assert_eq!(faults(case, leak, &origins), [""; 0], "{name}");
            });
        }
    }

    #[test]
    fn another_line_or_function_or_order_is_a_fault() {
        with_leak("db_retry", |case, leak| {
            let changed = |change: &dyn Fn(&mut Origin)| {
                let mut origins = right(case, 40);
                change(&mut origins[0]);
                faults(case, leak, &origins)
            };
            let line = changed(&|origin| origin.function.as_mut().unwrap().line = Some(3));
            assert_eq!(line, ["the origin is said to be db_connect (db_retry.c:3)"]);
            let order = changed(&|origin| origin.stack.swap(1, 2));
            assert_eq!(order.len(), 1, "{order:?}");
            let between = changed(&|origin| origin.stack.insert(2, own("other", "db_retry.c", 5)));
            assert_eq!(between.len(), 1, "{between:?}");
            let qualified =
                changed(&|origin| origin.stack[1].function = Some("db::db_connect(char const*)".to_owned()));
            assert_eq!(qualified, [""; 0]);
            let longer = changed(&|origin| origin.stack[1].function = Some("old_db_connect".to_owned()));
            assert_eq!(longer.len(), 1, "{longer:?}");
        });
    }

    #[test]
    fn one_in_a_hundred_may_be_without_a_stack() {
        with_leak("db_retry", |case, leak| {
            let nothing =
                |live| Origin { live, syscall: "openat".to_owned(), function: None, stack: Vec::new() };
            let with = |live, without| [right(case, live), vec![nothing(without)]].concat();
            assert_eq!(faults(case, leak, &with(99, 1)), [""; 0]);
            assert_eq!(
                faults(case, leak, &with(98, 2)),
                ["98 of 100 have the right origin, but 2 by openat of no stack"]
            );
            assert_eq!(faults(case, leak, &[]), ["0 of 0 have the right origin"]);
        });
    }

    #[test]
    fn an_interpreter_has_its_own_functions() {
        with_leak("sockets_list", |case, leak| {
            const PYTHON: &str = "/usr/bin/python3.11";
            let stack = [
                native("__socket", "/lib/libc.so.6"),
                native("_PyObject_MakeTpCall", PYTHON),
                native("_PyEval_EvalFrameDefault", PYTHON),
                native("Py_RunMain", PYTHON),
            ];
            let origin = |function: usize, frames: usize| {
                let function = Some(stack[function].clone());
                [Origin { live: 9, syscall: "socket".to_owned(), function, stack: stack[..frames].to_vec() }]
            };
            assert_eq!(faults(case, leak, &origin(1, 4)), [""; 0]);
            assert_eq!(faults(case, leak, &origin(0, 4)), ["the origin is said to be __socket in libc.so.6"]);
            assert_eq!(faults(case, leak, &origin(1, 3)).len(), 1);
        });
    }
}
