use std::{collections::BTreeSet, time::Instant};

use super::{parse::NO_REASON, *};

fn function(name: &str) -> Function {
    Function {
        function: Some(name.to_owned()),
        file: None,
        line: None,
        inlined: false,
        module: Some("/usr/bin/app".to_owned()),
        build_id: None,
        offset: "10".to_owned(),
        uncertain: false,
    }
}

fn stack(names: &[&str]) -> Vec<Function> {
    names.iter().map(|name| function(name)).collect()
}

fn subject<'a>(stack: &'a [Function]) -> Subject<'a> {
    Subject {
        kind: Kind::Fd,
        comm: "payments",
        syscall: "openat",
        resource: "file",
        target: "/var/lib/app/data.db",
        thread: "",
        stack,
    }
}

fn rules(text: &str) -> Suppressions {
    let mut rules = Suppressions::none();
    rules.add(text, "my.supp").unwrap();
    rules
}

/// Whether a rule for fds with these lines matches.
fn is_matched(lines: &str, subject: &Subject<'_>) -> bool {
    rules(&format!("{{\nname\nreason: known\nfd\n{lines}\n}}")).of(subject).is_some()
}

fn error(text: &str) -> ParseError {
    Suppressions::none().add(text, "my.supp").unwrap_err()
}

#[test]
fn words_of_kinds_are_read_back() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_word(kind.word()), Some(kind));
    }
    assert_eq!(Kind::from_word("any"), None);
}

#[test]
fn a_block_says_what_it_is_for() {
    let rules = rules(
        "# ours\n\n{\r\n   the database # 1\n   reason: kept open: it is a cache\n  fd, exec-fd\n   comm: pay*\n   syscall: open?t\n\
         \tresource: {file,pipe}\n   target: /var/*.db\n   # below main\n   fun: open*\n   ...\n   fun: main\n}\n",
    );
    let stack = stack(&["open64", "db_open", "main", "_start"]);
    let found = rules.of(&subject(&stack)).unwrap();
    assert_eq!(
        (found.name.as_str(), found.reason.as_str(), &*found.file, found.line),
        ("the database # 1", "kept open: it is a cache", "my.supp", 3)
    );
    assert!(rules.of(&Subject { kind: Kind::ExecFd, ..subject(&stack) }).is_some());
    for other in [
        Subject { kind: Kind::Thread, ..subject(&stack) },
        Subject { comm: "nginx", ..subject(&stack) },
        Subject { syscall: "open", ..subject(&stack) },
        Subject { resource: "socket", ..subject(&stack) },
        Subject { target: "", ..subject(&stack) },
        Subject { stack: &stack[1..], ..subject(&stack) },
    ] {
        assert!(rules.of(&other).is_none(), "{other:?}");
    }
}

#[test]
fn any_is_every_kind() {
    let rules = rules("{\nn\nreason: r\nany\ncomm: payments\n}");
    for kind in Kind::ALL {
        assert!(rules.of(&Subject { kind, ..subject(&[]) }).is_some());
    }
}

#[test]
fn a_wrong_line_is_named_with_a_remedy() {
    for (text, line, cause) in [
        ("fd\n", 1, "`fd` is outside of a block"),
        ("{ n\n", 1, "`{ n` is outside of a block"),
        ("\n{\nn\nreason: r\nfd\ncomm: a\n", 2, "the block has no end"),
        ("{\n}\n", 2, "the rule has no name"),
        ("{\nreason: r\n", 2, "the rule has no name"),
        ("{\nn\nfd\n}", 3, "the rule does not say why it is there"),
        ("{\nn\n}", 3, "the rule does not say why it is there"),
        ("{\nn\nreason:  \nfd\n}", 3, "the reason is empty"),
        ("{\nn\nreason: TODO say why\nfd\n}", 3, "the reason is still the placeholder"),
        ("{\nn\nreason: todo\nfd\n}", 3, "the reason is still the placeholder"),
        ("{\nn\nreason: a\u{1b}[2J\nfd\n}", 3, "the reason holds characters that control a terminal"),
        ("{\nn\nreason: r\n# c\nfd, fds\n}", 5, "`fds` is no kind of finding"),
        ("{\nn\nreason: r\ncomm: a\n}", 4, "`comm: a` is no kind of finding"),
        ("{\nn\nreason: r\nfd\nname: a\n}", 5, "`name: a` is no line of a rule"),
        ("{\nn\nreason: r\nfd\nmain\n}", 5, "`main` is no line of a rule"),
        ("{\nn\nreason: r\nfd\ncomm: a\n{\n", 6, "a block begins inside the one of line 1"),
        ("{\nn\nreason: r\nfd\ncomm: a\ncomm: b\n}", 6, "`comm:` is given twice"),
        ("{\nn\nreason: r\nfd\nfun: a\ncomm: b\n}", 6, "`comm:` comes after the stack"),
        ("{\nn\nreason: r\nfd\nfun:\n}", 5, "the glob is empty"),
        ("{\nn\nreason: r\nfd\n}", 5, "the rule would suppress every finding of its kind"),
        ("{\nn\nreason: r\nany\n...\n}", 6, "the rule would suppress every finding of its kind"),
    ] {
        let error = error(text);
        assert_eq!((error.line, error.cause.as_str()), (line, cause), "{text:?}");
        assert!(!error.remedy.is_empty());
    }
    let glob = error("{\nn\nreason: r\nfd\nfun: operator[]\n}");
    assert_eq!(glob.line, 5);
    assert!(glob.to_string().starts_with("my.supp:5: `operator[]` is no glob: "), "{glob}");
    assert!(glob.remedy.contains("put \\ before"));
    // A word that only begins like the placeholder is a reason.
    rules("{\nn\nreason: todos.db is a cache\nfd\ncomm: a\n}");
    rules("{\nn\nreason: caf\u{e9}\nfd\ncomm: a\n}");
}

#[test]
fn hostile_input_is_bounded() {
    assert_eq!(error(&"#".repeat(MAX_FILE + 1)).cause, "the file is larger than 1 MiB");
    let one = "{\nn\nreason: r\nfd\ncomm: a\n}\n";
    let mut full = rules(&one.repeat(MAX_RULES));
    let over = full.add(one, "b.supp").unwrap_err();
    assert_eq!(
        (over.file.as_str(), over.line, over.cause.as_str()),
        ("b.supp", 1, "there are more than 10000 rules")
    );
    for glob in
        ["{".repeat(2000) + "a" + &"}".repeat(2000), "[".repeat(4000), "\\".to_owned(), "a".repeat(5000)]
    {
        assert_eq!(error(&format!("{{\nn\nreason: r\nfd\ncomm: {glob}\n}}")).line, 5);
    }
    let many = "fun: a\n".repeat(600);
    assert_eq!(
        error(&format!("{{\nn\nreason: r\nfd\n{many}}}")).cause,
        "the rule has too many lines of a stack"
    );
}

#[test]
fn a_file_is_taken_whole_or_not_at_all() {
    let mut rules = Suppressions::none();
    assert!(rules.add("{\nn\nreason: r\nfd\ncomm: payments\n}\n{\n", "a").is_err());
    assert!(rules.of(&subject(&[])).is_none());
}

#[test]
fn stars_cross_slashes_and_names_count_as_they_are() {
    let stack = stack(&["foo::{{closure}}", "char const* f(char*, int [4])"]);
    let subject = subject(&stack);
    for (lines, expected) in [
        ("target: /var/*", true),
        ("target: *.db", true),
        ("target: data.db", false),
        ("target: /var/lib/app/data.??", true),
        ("target: /var/lib/app/data.?", false),
        ("target: [!/]*", false),
        ("fun: foo::{{closure}}", true),
        ("fun: foo::\\{\\{closure\\}\\}", true),
        ("fun: foo::*\nfun: char const* f(char*, int [4])", true),
        ("fun: foo::closure", false),
        ("fun: foo\\*", false),
    ] {
        assert_eq!(is_matched(lines, &subject), expected, "{lines}");
    }
}

#[test]
fn lines_are_a_prefix_of_the_stack() {
    let stack = stack(&["a", "b", "a", "c", "d"]);
    let subject = subject(&stack);
    for (lines, expected) in [
        ("fun: a", true),
        ("fun: b", false),
        ("...\nfun: b", true),
        ("fun: a\nfun: b\n...\nfun: d", true),
        ("...\nfun: a\nfun: c", true),
        ("...\nfun: a\nfun: d", false),
        ("...\nfun: b\n...\nfun: b", false),
        ("...\n...\nfun: d\n...", true),
        ("...\nfun: d\nfun: *", false),
        ("fun: *\nfun: *\nfun: *\nfun: *\nfun: *", true),
        ("fun: a\n...\nfun: a\n...\nfun: a", false),
    ] {
        assert_eq!(is_matched(lines, &subject), expected, "{lines}");
    }
    assert!(!is_matched("fun: *", &Subject { stack: &[], ..subject }));
}

#[test]
fn functions_are_known_by_name_module_and_source() {
    let known = Function {
        file: Some("src/net/pool.c".to_owned()),
        line: Some(118),
        module: Some("/usr/lib/libpool.so.3".to_owned()),
        ..function("connect@@POOL_2.1")
    };
    let bare = Function { function: None, file: None, line: None, module: None, ..function("") };
    let stack = [known, bare];
    let subject = subject(&stack);
    for (lines, expected) in [
        ("fun: connect", true),
        ("fun: connect@@POOL_2.1", true),
        ("obj: libpool.so*", true),
        ("obj: /usr/lib/*", true),
        ("obj: lib/libpool.so.3", false),
        ("src: pool.c", true),
        ("src: pool.c:118", true),
        ("src: src/*/pool.c:118", true),
        ("src: pool.c:119", false),
        ("src: net/pool.c", false),
        ("src: */pool.c", true),
        // What is not known matches nothing but `...`.
        ("fun: connect\nfun: *", false),
        ("fun: connect\nobj: *", false),
        ("fun: connect\nsrc: *", false),
        ("fun: connect\n...", true),
    ] {
        assert_eq!(is_matched(lines, &subject), expected, "{lines}");
    }
}

#[test]
fn many_wildcards_are_quick() {
    let stack = vec![function("a"); 256];
    let lines = "...\nfun: a\nfun: a\n".repeat(100) + "...\nfun: b";
    let began = Instant::now();
    assert!(!is_matched(&lines, &subject(&stack)));
    assert!(began.elapsed().as_secs() < 2);
}

#[test]
fn the_users_rules_come_first_and_the_unused_are_known() {
    let mut rules = Suppressions::builtin();
    rules
        .add("{\nnever\nreason: r\nfd\ncomm: other\n}\n{\nmine\nreason: r\nfd\ncomm: payments\n}", "a")
        .unwrap();
    rules.add("{\nlater\nreason: r\nfd\ncomm: pay*\n}\n", "b").unwrap();
    let listener = Subject { target: "tcp 0.0.0.0:80 LISTEN", resource: "socket", ..subject(&[]) };
    let matched = BTreeSet::from([rules.of(&listener).unwrap().id]);
    assert_eq!(rules.of(&listener).unwrap().name, "mine");
    let unused: Vec<_> =
        rules.unused(&matched).map(|rule| (rule.name.as_str(), &*rule.file, rule.line)).collect();
    assert_eq!(unused, [("never", "a", 1), ("later", "b", 1)]);
    let own = rules.of(&Subject { comm: "nginx", ..listener }).unwrap();
    assert_eq!((own.name.as_str(), &*own.file), ("listening-sockets", "built-in"));
    let ids: BTreeSet<_> = rules.users.iter().chain(&rules.builtin).map(|rule| rule.id).collect();
    assert_eq!(ids.len(), rules.users.len() + rules.builtin.len());
}

/// The block is refused as it is, and matches once it has a reason.
fn round_trip(subject: &Subject<'_>) -> String {
    let block = generate(subject);
    let refused = error(&block);
    assert_eq!((refused.line, refused.cause.as_str()), (3, "the reason is still the placeholder"), "{block}");
    let rules = rules(&block.replace(NO_REASON, "known"));
    assert!(rules.of(subject).is_some(), "{block}{subject:?}");
    block
}

#[test]
fn a_generated_block_matches_its_finding_and_no_other() {
    let names = [
        "app::Vec<int*, std::allocator<int*> >::operator[](unsigned long) const",
        "app::Pool::grow(char const* const*, int [4])",
        "<app::Pool<T> as core::ops::Index<[u8; 4]>>::index::{{closure}}",
        "app::pool::{impl#3}::open",
        "main.(*Server[go.shape.*uint8_0]).Serve.func1",
        "github.com/acme/pool.Get[...]",
        "a\\x0ab?",
        " led and trailed ",
        "~Pool",
        "caf\u{e9} \u{202e} end",
    ];
    for name in names {
        let stack = stack(&["open64", name, "main"]);
        let libc = Function { module: Some("/lib/libc.so.6".to_owned()), ..stack[0].clone() };
        let stack = [libc, stack[1].clone(), stack[2].clone()];
        let block = round_trip(&subject(&stack));
        assert!(!block.contains("open64") && !block.contains("target:"), "{block}");
        let rules = rules(&block.replace(NO_REASON, "known"));
        let mut other = stack.clone();
        other[1].function = Some(name.chars().skip(1).collect::<String>() + "x");
        assert!(rules.of(&subject(&other)).is_none(), "{block}");
    }
}

#[test]
fn a_generated_block_has_six_own_functions_at_most() {
    let mut names = vec!["std::sys::fs::open", "core::ops::call_once"];
    names.extend(["a", "b", "c", "d", "e", "f", "g", "h"]);
    let stack = stack(&names);
    assert_eq!(
        round_trip(&subject(&stack)),
        "{\n   fd in a\n   reason: TODO say why\n   fd\n   comm: payments\n   syscall: openat\n   resource: file\n   ...\n   \
         fun: a\n   fun: b\n   fun: c\n   fun: d\n   fun: e\n   fun: f\n}\n"
    );
}

#[test]
fn go_frames_of_the_standard_library_are_left_out() {
    let of = |name: &str| Function { file: Some("x.go".to_owned()), ..function(name) };
    let stack = [of("syscall.openat"), of("os.Open"), of("main.leak")];
    let block = round_trip(&subject(&stack));
    assert!(block.contains("...\n   fun: main.leak\n"), "{block}");
}

#[test]
fn inlined_functions_of_the_standard_library_are_left_out() {
    let std = Function {
        file: Some("/rustc/1/library/std/src/thread/builder.rs".to_owned()),
        inlined: true,
        ..function("spawn<app::work::{closure_env#0}, ()>")
    };
    let block = round_trip(&subject(&[std, function("app::work")]));
    assert!(block.contains("...\n   fun: app::work\n"), "{block}");
}

#[test]
fn what_has_no_name_is_told_by_its_module() {
    let plugin = Function { function: None, module: Some("/opt/a[1]/plug*.so".to_owned()), ..function("") };
    let memory = Function { module: None, ..plugin.clone() };
    let guessed = Function { uncertain: true, ..function("main") };
    let stack = [plugin, memory, guessed];
    let block = round_trip(&subject(&stack));
    assert!(block.ends_with("   ...\n   obj: plug\\*.so\n   ...\n   fun: main\n}\n"), "{block}");
}

#[test]
fn without_a_stack_it_goes_by_the_target() {
    let of = |target| {
        let block = round_trip(&Subject { target, ..subject(&[]) });
        block.lines().find_map(|line| line.trim().strip_prefix("target: ")).unwrap().to_owned()
    };
    assert_eq!(of("/var/a.db"), "/var/a.db");
    assert_eq!(of("pipe:[910869]"), "pipe:\\[*\\]");
    assert_eq!(
        of("tcp 10.0.0.1:80 -> 10.0.0.2:51234 ESTABLISHED"),
        "tcp 10.0.0.1:80 -> 10.0.0.2:* ESTABLISHED"
    );
    assert_eq!(of("/tmp/{a,b}\n?"), "/tmp/\\{a,b\\}*\\?");
    let long = "x".repeat(3000);
    assert!(of(&long).len() < 1100);
}

#[test]
fn a_finding_of_which_nothing_is_known_has_a_block_too() {
    let empty = Subject { comm: "", syscall: "", resource: "", target: "", ..subject(&[]) };
    for kind in Kind::ALL {
        round_trip(&Subject { kind, ..empty });
    }
    round_trip(&Subject { thread: "GC Thread", comm: "\n} #", ..empty });
}
