//! The reports of the last drains, kept in the state folder: no user crowds out those of the administrator. One under way
//! is there, too, as far as it is: a host that crashes takes the journal with it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, task::spawn_blocking};

use super::{
    command::View,
    registry::is_admin,
    report::{Document, State},
};
use crate::state;

/// Reports that are kept of the administrator's drains, and of those of users.
const KEPT: usize = 32;
/// A report of a user's drain is called so at its end, any other only `.json`.
const OF_USER: &str = ".user.json";

/// Keeps a report, and the last ones before it. There is none of a drain of nothing.
pub(super) fn keep(folder: &Path, document: &Document) -> io::Result<()> {
    if document.services.is_empty() {
        return Ok(());
    }
    let (folder, is_users) = (folder.join("drains"), !is_admin(document.uid));
    fs::create_dir_all(&folder)?;
    let end = if is_users { OF_USER } else { ".json" };
    state::replace(&folder, &format!("{}{end}", document.id), &serde_json::to_vec(document)?)?;
    let mut all: Vec<_> = fs::read_dir(&folder)?
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(OF_USER) == is_users)
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
    let mut reports: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| (entry.metadata().and_then(|about| about.modified()).ok(), entry.path()))
        .filter(|(_, path)| path.extension().is_some_and(|end| end == "json"))
        .collect();
    reports.sort();
    reports.iter().rev().find_map(|(_, path)| {
        let read = fs::read(path).map_err(serde_json::Error::io);
        read.and_then(|bytes| serde_json::from_slice(&bytes))
            .inspect_err(|error| {
                tracing::warn!("the report {} of a drain cannot be read: {error}", path.display());
            })
            .ok()
    })
}

/// Whose turn it is to write: nobody writes what was before the end after the end.
#[derive(Clone, Debug, Default)]
pub(super) struct Turn(Arc<Mutex<()>>);

impl Turn {
    pub(super) fn take(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps each drain as far as it is, beside whoever drives it: no signal waits for a disk. Ends with the driver.
pub(super) async fn keep_unfinished(folder: PathBuf, mut views: watch::Receiver<View>, turn: Turn) {
    let mut before = None;
    while views.changed().await.is_ok() {
        let (folder, views, turn) = (folder.clone(), views.clone(), turn.clone());
        let written = spawn_blocking(move || {
            let _turn = turn.take();
            let document = views.borrow().drain.clone().filter(|drain| drain.state != State::Finished)?;
            let how_far = document.how_far();
            if Some(&how_far) != before.as_ref()
                && let Err(error) = keep(&folder, &document)
            {
                tracing::warn!("a drain under way is not kept: {error}");
            }
            Some(how_far)
        });
        before = written.await.ok().flatten();
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{course::Begun, machine::Machine, service::Service},
        *,
    };
    use crate::clock::Calendar;

    fn document(id: &str, uid: u32, services: Vec<Service>) -> Document {
        let stages = services.iter().enumerate().map(|(at, _)| vec![at]).collect();
        let (boot_id, trigger) = ("b".to_owned(), "test".to_owned());
        let id = id.to_owned();
        let begun =
            Begun { id, boot_id, trigger, uid, began: 0, deadline: 1, stages, services, absent: Vec::new() };
        Document::new(&Machine::begin(begun).0, "kept", Calendar::now(), 1)
    }

    #[test]
    fn no_user_crowds_out_the_reports_of_the_administrator() {
        let folder = std::env::temp_dir().join(format!("plumb-reports-{}", std::process::id()));
        let web = || vec![Service::example("web")];
        keep(&folder, &document("mine", 0, web())).unwrap();
        for number in 0..2 * KEPT {
            keep(&folder, &document(&format!("theirs-{number:02}"), 1000, web())).unwrap();
            keep(&folder, &document(&format!("nothing-{number:02}"), 1000, Vec::new())).unwrap();
        }
        let names = || -> Vec<String> {
            let entries = fs::read_dir(folder.join("drains")).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names().len(), KEPT + 1);
        assert_eq!(names()[..2], ["mine.json", "theirs-32.user.json"]);
        assert_eq!(last(&folder).unwrap().id, "theirs-63");
        fs::write(folder.join("drains/theirs-63.user.json"), "{").unwrap();
        assert_eq!(last(&folder).unwrap().id, "theirs-62", "what is damaged is passed over");
        for number in 0..KEPT {
            keep(&folder, &document(&format!("own-{number:02}"), 0, web())).unwrap();
        }
        assert_eq!(names().len(), 2 * KEPT);
        assert_eq!(names()[..2], ["own-00.json", "own-01.json"]);
        fs::remove_dir_all(&folder).unwrap();
    }
}
