//! docs/fd-paths.md: by which paths fds and threads come and go, and who sees it on which kernel. Generated
//! from what the kernel tests print, and checked for being current.

use std::{collections::BTreeMap, fs};

use anyhow::{Result, bail, ensure};

use crate::{vm, workspace};

const FILE: &str = "docs/fd-paths.md";
/// How a kernel test reports a result: seam, path, result.
const MARK: &str = "path-result ";
const UNSUPPORTED: &str = "unsupported";

const HEAD: &str = "\
# Paths of fds and threads

By which paths an fd table or a thread group changes, and who sees it: measured by the kernel tests in virtual
machines, one program per path (`agent/examples/fd_paths/`). Written by `cargo xtask test --bless`;
`cargo xtask test` fails when it is not what the kernels show. A column is a kernel and a seam, the hook that
sees fd events (`ARCHITECTURE.md`).

On every path and every kernel the pass over all processes must be what /proc says: fds by number, their count,
and the threads. The tests fail where it is not, so that is not in the table. The cells say what of the change
is seen:

- `event`: when it happens, with process and fd. Without `reconcile` there is nothing to count (a mark), or the
  fd is in a table that one thread has for itself, which /proc/PID/fd does not show either.
- `reconcile`: by the next pass.
- `some events`, `some by reconcile`: part of what changes.
- `none`: no fd table and no thread group changes, and nothing is seen; what is open all the same, such as a
  direct descriptor of io_uring, is in no count; `plumb fds` tells their number beside the ring.
- `unseen`: something changes that neither shows: a mark for exec.
- `false event`: an event for what has not happened. A pass is not misled.
- `unsupported`: this kernel does not have it, and the error it gives.
";

const TAIL: &str = "
Not measured: what needs hardware or modules that no pinned kernel has (KVM, DRM, dma-buf, VFIO, iommufd, GPIO,
media, tee, ntsync, vduse, autofs, KCM, SCTP, binder, cachefiles), the handshake over netlink, BPF iterators
and tokens, the fd of a binary's interpreter (binfmt_misc), and fds that a security module swaps at exec.
";

/// One row per path, one column per kernel and seam.
#[derive(Debug, Default, PartialEq)]
struct Table {
    columns: Vec<String>,
    /// Cells by path, then by column.
    cells: BTreeMap<String, BTreeMap<String, String>>,
}

impl Table {
    /// Reads the table of a document; what is not a row is passed over.
    fn parse(document: &str) -> Self {
        let mut table = Self::default();
        for line in document.lines() {
            let Some(row) = line.strip_prefix('|').and_then(|row| row.strip_suffix('|')) else { continue };
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            if table.columns.is_empty() {
                table.columns = cells.iter().skip(2).map(|cell| (*cell).to_owned()).collect();
            } else if let Some(name) = cells[0].strip_prefix('`').and_then(|name| name.strip_suffix('`')) {
                let values = cells.iter().skip(2).map(|cell| (*cell).to_owned());
                let row = table.columns.iter().cloned().zip(values).collect();
                table.cells.insert(name.to_owned(), row);
            }
        }
        table
    }

    /// Takes in what was printed on one kernel, in the place of what was known of it.
    fn measure(&mut self, series: &str, lines: &[String]) {
        let of_series = |column: &String| column.split(' ').next() == Some(series);
        self.columns.retain(|column| !of_series(column));
        self.cells.values_mut().for_each(|row| row.retain(|column, _| !of_series(column)));
        for line in lines {
            // The test harness may have begun the line.
            let result = line.split_once(MARK).map(|(_, result)| result.trim_end());
            let mut words = result.unwrap_or_default().splitn(3, ' ');
            let (Some(seam), Some(name), Some(result)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let column = format!("{series} {seam}");
            if !self.columns.contains(&column) {
                self.columns.push(column.clone());
            }
            self.cells.entry(name.to_owned()).or_default().insert(column, result.to_owned());
        }
    }

    /// Puts the columns in the order of the kernels and drops those of kernels that are not pinned any more,
    /// and the rows of paths that are gone.
    fn arrange(&mut self, series: &[String], paths: &[(&str, &str)]) {
        let rank =
            |column: &String| series.iter().position(|series| column.split(' ').next() == Some(series));
        self.columns.retain(|column| rank(column).is_some());
        self.columns.sort_by_key(rank);
        self.cells.retain(|name, _| paths.iter().any(|(path, _)| path == name));
    }

    /// The document. A path without a result is an error, and so is one that no kernel has.
    fn render(&self, paths: &[(&str, &str)]) -> Result<String> {
        let mut text = format!("{HEAD}\n| path | what it is | {} |\n", self.columns.join(" | "));
        text += &format!("|---|---|{}\n", "---|".repeat(self.columns.len()));
        for (name, covers) in paths {
            let row = self.cells.get(*name);
            let cells: Option<Vec<&str>> =
                self.columns.iter().map(|column| Some(row?.get(column)?.as_str())).collect();
            let Some(cells) = cells else {
                bail!("no result for the path {name} on one of {:?}", self.columns)
            };
            ensure!(
                !cells.iter().all(|cell| cell.starts_with(UNSUPPORTED)),
                "no pinned kernel has {name}: it is not tested"
            );
            text += &format!("| `{name}` | {covers} | {} |\n", cells.join(" | "));
        }
        Ok(text + TAIL)
    }
}

/// Compares what was printed on each series with the document, or writes the document.
pub(crate) fn settle(listing: &str, printed: &[(String, Vec<String>)], bless: bool) -> Result<()> {
    let paths: Vec<(&str, &str)> = listing.lines().filter_map(|line| line.split_once('\t')).collect();
    let file = workspace().join(FILE);
    let written = fs::read_to_string(&file).unwrap_or_default();
    let mut table = Table::parse(&written);
    for (series, lines) in printed {
        table.measure(series, lines);
    }
    let pinned: Vec<String> = vm::select(&[])?.into_iter().map(|kernel| kernel.series).collect();
    table.arrange(&pinned, &paths);
    let current = table.render(&paths)?;
    if written == current {
        return Ok(());
    }
    if bless {
        fs::create_dir_all(workspace().join("docs"))?;
        fs::write(file, current)?;
        eprintln!("xtask: {FILE} is written anew");
        return Ok(());
    }
    let differences: Vec<_> =
        current.lines().filter(|line| !written.lines().any(|known| known == *line)).collect();
    bail!(
        "{FILE} is not what the kernels show; `cargo xtask test --bless` writes it anew:\n{}",
        differences.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [(&str, &str); 2] = [("close", "close(2)"), ("open", "open(2)")];

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    fn table() -> Table {
        let mut table = Table::default();
        table.measure(
            "6.1",
            &lines(&["path-result a open event", "test x ... path-result a close none", "ok"]),
        );
        table
            .measure("5.10", &lines(&["path-result a close unsupported ENOSYS", "path-result a open event"]));
        table
    }

    #[test]
    fn a_document_comes_back_as_it_was_written() {
        let mut table = table();
        table.arrange(&lines(&["5.10", "6.1"]), &PATHS);
        let document = table.render(&PATHS).unwrap();
        assert!(document.contains("| `close` | close(2) | unsupported ENOSYS | none |\n"), "{document}");
        assert_eq!(Table::parse(&document), table);
        // A second look at one kernel replaces its column only.
        table.measure("5.10", &lines(&["path-result a close none", "path-result a open event"]));
        table.arrange(&lines(&["5.10", "6.1"]), &PATHS);
        assert!(table.render(&PATHS).unwrap().contains("| `close` | close(2) | none | none |\n"));
    }

    #[test]
    fn the_committed_document_has_the_words_of_this_file_and_every_pinned_kernel() {
        let document = fs::read_to_string(workspace().join(FILE)).unwrap();
        assert!(document.starts_with(HEAD) && document.ends_with(TAIL), "cargo xtask test --bless");
        let columns = Table::parse(&document).columns;
        for kernel in vm::select(&[]).unwrap() {
            assert!(columns.iter().any(|column| column.starts_with(&kernel.series)), "{}", kernel.series);
        }
    }

    #[test]
    fn a_path_without_a_result_or_without_a_kernel_is_an_error() {
        let mut table = table();
        table.measure("6.1", &lines(&["path-result a open event"]));
        assert!(table.render(&PATHS).unwrap_err().to_string().starts_with("no result for the path close"));
        table.measure("6.1", &lines(&["path-result a close unsupported ENOSYS"]));
        assert!(table.render(&PATHS[..1]).unwrap_err().to_string().starts_with("no pinned kernel has close"));
    }
}
