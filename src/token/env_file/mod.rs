//! The token in an env file, where older programs and the next start find it.
//!
//! # Invariants
//!
//! - Whenever the writer dies, the file is whole: the old one or the new one.
//! - Only the lines of our variable change. Mode and owner stay, a symbolic
//!   link stays a link.
//! - Nothing is left beside the file; what a killed writer left there, the next
//!   one removes.

#[cfg(test)]
mod tests;
pub(crate) mod text;

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata, TryLockError},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, fchown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{StoreError, Token};
use text::Length;

/// A larger file is hardly an env file.
const MAX_SIZE: u64 = 1024 * 1024;

/// How long another writer may take. One write takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The pause between two tries to lock.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Symbolic links that are followed one after the other.
const MAX_LINKS: usize = 16;

/// How the names of new files end until they take the old one's place.
const TEMPORARY: &str = ".token-sidecar";

/// The line `CHITAI_GOROD_BEARER_TOKEN="…"` of an env file. Its calls block.
#[derive(Clone, Debug)]
pub struct EnvFile {
    path: PathBuf,
    create: bool,
}

impl EnvFile {
    /// Names the file. `create`: it is made by the first save if it is missing.
    #[must_use]
    pub fn new(path: PathBuf, create: bool) -> Self {
        Self { path, create }
    }

    /// The file as it was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a save would leave the token there: the file exists, or is made
    /// where it is missing.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.create || link_target(&self.path).exists()
    }

    /// Reads the token. `None`: the file, the line or the value is missing, or
    /// the value cannot be read, which is reported.
    ///
    /// # Errors
    ///
    /// [`StoreError::EnvFile`] when there is a file that cannot be read.
    pub fn load(&self) -> Result<Option<Token>, StoreError> {
        let content = read(&self.path).map_err(|reason| self.error("read", reason))?;
        let content = content.unwrap_or_default();
        let value = text::value(&content).filter(|value| !value.is_empty());
        let token = value.and_then(text::parsed);
        if value.is_some() && token.is_none() {
            let path = self.path.display();
            warn!(%path, variable = text::VARIABLE, "unreadable value in the env file ignored");
        }
        Ok(token)
    }

    /// Sets the line to `token`, or adds it. `false`: nothing was to be done,
    /// because the line is right already or the file is missing and not to be
    /// created.
    ///
    /// # Errors
    ///
    /// [`StoreError::EnvFile`] when the file cannot be written in any way. It
    /// is then as it was.
    pub fn save(&self, token: &Token) -> Result<bool, StoreError> {
        self.try_save(token).map_err(|reason| self.error("write", reason))
    }

    fn try_save(&self, token: &Token) -> io::Result<bool> {
        let path = link_target(&self.path);
        if !self.create && !path.try_exists()? {
            return Ok(false);
        }
        let folder = Folder::lock(&path)?;
        let Some(old) = read(&path)? else {
            return self.create_with(token, &path, &folder);
        };
        let Some(new) = text::with_token(&old, token, Length::Natural) else {
            return Ok(false);
        };
        match folder.replace(&path, &new) {
            Err(error) if forbids_replacing(&error) => write_in_place(&path, token),
            outcome => outcome.map(|()| true),
        }
    }

    fn create_with(&self, token: &Token, path: &Path, folder: &Folder) -> io::Result<bool> {
        let new = text::with_token(b"", token, Length::Natural);
        if let Some(new) = new.filter(|_| self.create) {
            folder.create(path, &new)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn error(&self, action: &'static str, reason: io::Error) -> StoreError {
        StoreError::EnvFile { action, path: self.path.clone(), reason: reason.into() }
    }
}

/// The folder of the file, locked against other writers while this lives.
struct Folder {
    path: PathBuf,
    /// What the names of new files begin with.
    prefix: OsString,
    /// `None` where the folder may not be read; then it is not locked either.
    handle: Option<File>,
}

impl Folder {
    /// Locks the folder that `file` is in, and tidies up after killed writers.
    /// The lock is on the folder itself, so that no lock file lies about.
    fn lock(file: &Path) -> io::Result<Self> {
        let mut prefix = file.file_name().unwrap_or_default().to_owned();
        prefix.push(".");
        let path = match file.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let handle = File::open(&path).ok();
        let folder = Self { path, prefix, handle };
        if let Some(handle) = &folder.handle
            && lock(handle)?
        {
            // Nobody else is writing, so what lies there lies there for good.
            folder.remove_leftovers();
        }
        Ok(folder)
    }

    /// Puts a file with the content `new` in the place of the one at `path`.
    fn replace(&self, path: &Path, new: &[u8]) -> io::Result<()> {
        let old = fs::metadata(path)?;
        let mut file = self.temporary()?;
        file.write_all(new)?;
        keep_owner_and_mode(file.as_file(), &old)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|failed| failed.error)?;
        self.sync();
        Ok(())
    }

    /// Makes a file that only we may read, unless there is one by now.
    fn create(&self, path: &Path, new: &[u8]) -> io::Result<()> {
        let mut file = self.temporary()?;
        file.write_all(new)?;
        file.as_file().sync_all()?;
        file.persist_noclobber(path).map_err(|failed| failed.error)?;
        self.sync();
        Ok(())
    }

    fn temporary(&self) -> io::Result<tempfile::NamedTempFile> {
        tempfile::Builder::new().prefix(&self.prefix).suffix(TEMPORARY).tempfile_in(&self.path)
    }

    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else {
            return;
        };
        for entry in entries.flatten() {
            if self.is_temporary(&entry.file_name()) {
                // It only is litter: not worth failing a save.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn is_temporary(&self, name: &OsStr) -> bool {
        let name = name.as_encoded_bytes();
        name.starts_with(self.prefix.as_encoded_bytes()) && name.ends_with(TEMPORARY.as_bytes())
    }

    fn sync(&self) {
        if let Some(handle) = &self.handle {
            // Some file systems cannot; the new file is in place anyway.
            let _ = handle.sync_all();
        }
    }
}

/// The file that `path` leads to, whether it exists or not.
fn link_target(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else {
            break;
        };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    path
}

/// The content; `None` where there is no file.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        // A pipe would make us wait, a device would be replaced by a file.
        Ok(found) if !found.is_file() => Err(io::Error::other("it is not a regular file")),
        Ok(found) if found.len() > MAX_SIZE => Err(ErrorKind::FileTooLarge.into()),
        // A file that is mounted into a container goes on without its name.
        Ok(found) if found.nlink() == 0 => {
            Err(io::Error::other("it was replaced where it is mounted from: restart the container"))
        }
        outcome => outcome.map(drop),
    }?;
    fs::read(path).map(Some)
}

fn keep_owner_and_mode(file: &File, old: &Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(old.permissions())
}

/// Whether the file cannot be replaced as it is: a mount point, a folder that
/// is not ours, an owner that we cannot set. A full disk is another matter.
fn forbids_replacing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::ResourceBusy
            | ErrorKind::CrossesDevices
    )
}

/// Writes what changes, and nothing else, by one write. The file never gets
/// shorter, and as a rule no byte of another line moves.
fn write_in_place(path: &Path, token: &Token) -> io::Result<bool> {
    let mut file = File::options().read(true).write(true).open(path)?;
    // The same file may be mounted into several folders.
    lock(&file)?;
    let mut old = Vec::new();
    file.read_to_end(&mut old)?;
    let Some(new) = text::with_token(&old, token, Length::AtLeastOld) else {
        return Ok(false);
    };
    let changed = text::changed(&old, &new);
    file.write_all_at(&new[changed.clone()], changed.start as u64)?;
    file.sync_all()?;
    Ok(true)
}

/// `false`: the file system has no locks. Then it must do without.
fn lock(file: &File) -> io::Result<bool> {
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(_)) => return Ok(false),
            Err(TryLockError::WouldBlock) if started.elapsed() >= LOCK_WAIT => {
                let text = "another program has held its lock for too long";
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
        }
    }
}
