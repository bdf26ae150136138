//! The reports of the last drains, kept in the state folder.

use std::{fs, io, path::Path};

use super::report::Document;
use crate::state;

/// Reports that are kept.
const KEPT: usize = 32;

/// Keeps a report, and the last ones before it.
pub(super) fn keep(folder: &Path, document: &Document) -> io::Result<()> {
    let folder = folder.join("drains");
    fs::create_dir_all(&folder)?;
    state::replace(&folder, &format!("{}.json", document.id), &serde_json::to_vec(document)?)?;
    let mut all: Vec<_> = fs::read_dir(&folder)?
        .filter_map(Result::ok)
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    all.sort();
    let old = all.len().saturating_sub(KEPT);
    all.iter().take(old).for_each(|(_, path)| drop(fs::remove_file(path)));
    Ok(())
}

/// The report of the last drain that an agent before has kept.
pub(super) fn last(folder: &Path) -> Option<Document> {
    let entries = fs::read_dir(folder.join("drains")).ok()?;
    let newest = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "json"))
        .max_by_key(|entry| entry.metadata().and_then(|about| about.modified()).ok())?;
    serde_json::from_slice(&fs::read(newest.path()).ok()?).ok()
}
