//! The env-file store on real files: every notation, and every way to be
//! refused or killed.

use std::{
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    process::{Child, Command, Stdio},
    thread,
};

use tempfile::TempDir;

use super::*;
use crate::token::test_support::{jwt, token};

/// Of `nobody`, for what root may always do.
const NOBODY: u32 = 65_534;

/// Other lines, of several kinds, around `line`.
fn surrounded(line: &str) -> Vec<u8> {
    let mut content = b"# settings \xff\xfe\nREDIS_URL=redis://redis:6379/0\n\n".to_vec();
    content.extend_from_slice(line.as_bytes());
    content.extend_from_slice(b"\n  LAST='a # b'  # no token here");
    content
}

/// A folder of its own with `.env` in it.
struct Fixture {
    folder: TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new(content: impl AsRef<[u8]>) -> Self {
        let fixture = Self::empty();
        fs::write(&fixture.path, content).unwrap();
        fixture
    }

    fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".env");
        Self { folder, path }
    }

    fn store(&self) -> EnvFile {
        EnvFile::new(self.path.clone(), false)
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    fn names(&self) -> Vec<OsString> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }
}

/// The lines without the spaces that fill them up.
fn unfilled(content: &[u8]) -> Vec<String> {
    let lines = content.split(|byte| *byte == b'\n');
    lines.map(|line| String::from_utf8_lossy(line.trim_ascii_end()).into_owned()).collect()
}

/// Checks that `old` becomes `new` in both ways of writing, `{}` being a token.
fn check(old: &str, new: &str) {
    let (before, after) = (token(1), token(2));
    let old = old.replace("{}", before.expose());
    let new = new.replace("{}", after.expose());
    let fixture = Fixture::new(surrounded(&old));
    assert!(fixture.store().save(&after).unwrap(), "{old}");
    let written = String::from_utf8_lossy(&fixture.content()).into_owned();
    let expected = surrounded(&new);
    assert_eq!(written, String::from_utf8_lossy(&expected), "{old}");
    assert_eq!(fixture.store().load().unwrap(), Some(after.clone()), "{old}");
    assert!(!fixture.store().save(&after).unwrap(), "{old}");
    assert_eq!(fixture.names(), [".env"]);

    let fixture = Fixture::new(surrounded(&old));
    assert!(write_in_place(&fixture.path, &after).unwrap());
    assert!(fixture.content().len() >= surrounded(&old).len());
    assert_eq!(fixture.store().load().unwrap(), Some(after), "{old}");
    assert_eq!(unfilled(&fixture.content()), unfilled(&expected), "{old}");
}

#[test]
fn the_line_is_found_and_kept_in_every_notation() {
    let name = text::VARIABLE;
    for (old, new) in [
        (r#"N="{}""#, r#"N="{}""#),
        ("N={}", r#"N="{}""#),
        ("N='{}'", r#"N="{}""#),
        ("N=", r#"N="{}""#),
        ("N=\"\"", r#"N="{}""#),
        ("N=\"{}", r#"N="{}""#),
        ("export N={}", r#"export N="{}""#),
        ("export \t N={}", "export \t N=\"{}\""),
        ("  N = {}  ", r#"  N = "{}""#),
        ("N='{}'  # by hand", "N=\"{}\"  # by hand"),
        ("N={} # by hand", "N=\"{}\" # by hand"),
        ("N=# none", "N=\"{}\" # none"),
        ("N= # none", "N= \"{}\" # none"),
        ("N=garbage#1", r#"N="{}""#),
        (r#"N="Bearer {}""#, r#"N="Bearer {}""#),
        ("N=Bearer {}", r#"N="Bearer {}""#),
        ("N=bearer {} # x", "N=\"Bearer {}\" # x"),
        ("N='Bearer%20{}'", r#"N="{}""#),
        ("N=\"{}\"\r", "N=\"{}\"\r"),
        ("N={}\nA=1\nN='{}'", "N=\"{}\"\nA=1\nN=\"{}\""),
    ] {
        check(&old.replace('N', name), &new.replace('N', name));
    }
}

#[test]
fn a_line_is_added_where_there_is_none() {
    let (name, token) = (text::VARIABLE, token(1));
    let line = format!("{name}=\"{}\"", token.expose());
    for (old, new) in [
        (String::new(), format!("{line}\n")),
        ("A=1\n".into(), format!("A=1\n{line}\n")),
        ("A=1".into(), format!("A=1\n{line}\n")),
        ("A=1\r\nB=2".into(), format!("A=1\r\nB=2\r\n{line}\r\n")),
        (format!("# {name}=x\n"), format!("# {name}=x\n{line}\n")),
        (format!("{name}_OLD=x\n"), format!("{name}_OLD=x\n{line}\n")),
        (format!("X{name}=x\n"), format!("X{name}=x\n{line}\n")),
        (format!("exported{name}=x\n"), format!("exported{name}=x\n{line}\n")),
    ] {
        let fixture = Fixture::new(&old);
        assert_eq!(fixture.store().load().unwrap(), None, "{old}");
        assert!(fixture.store().save(&token).unwrap());
        assert_eq!(String::from_utf8(fixture.content()).unwrap(), new);
        assert_eq!(fixture.store().load().unwrap().as_ref(), Some(&token));
    }
}

#[test]
fn a_byte_order_mark_hides_no_line() {
    let fixture = Fixture::new(format!("\u{feff}{}={}\n", text::VARIABLE, jwt("{}")));
    assert!(fixture.store().load().unwrap().is_some());
    assert!(fixture.store().save(&token(3)).unwrap());
    assert_eq!(fixture.content().split(|b| *b == b'\n').count(), 2);
}

#[test]
fn an_unreadable_value_counts_as_none_and_is_replaced() {
    let fixture = Fixture::new(format!("{}=\"not a token\"\n", text::VARIABLE));
    assert_eq!(fixture.store().load().unwrap(), None);
    assert!(fixture.store().save(&token(1)).unwrap());
    assert_eq!(fixture.store().load().unwrap(), Some(token(1)));
}

#[test]
fn in_place_a_shorter_token_moves_no_other_byte() {
    let long = Token::parse(&jwt(&format!(r#"{{"x":"{}"}}"#, "y".repeat(300)))).unwrap();
    let line = format!("{}=\"{}\"\r", text::VARIABLE, long.expose());
    let fixture = Fixture::new(surrounded(&line));
    let old = fixture.content();
    assert!(write_in_place(&fixture.path, &token(1)).unwrap());
    let new = fixture.content();
    assert_eq!(new.len(), old.len());
    assert!(new.ends_with(b"\n  LAST='a # b'  # no token here"));
    assert!(text::changed(&old, &new).len() <= line.len());
    // The room is used again.
    assert!(write_in_place(&fixture.path, &long).unwrap());
    assert_eq!(fixture.content(), old);
}

#[test]
fn mode_and_owner_are_kept() {
    let fixture = Fixture::new("A=1\n");
    for mode in [0o640, 0o600, 0o664] {
        fs::set_permissions(&fixture.path, fs::Permissions::from_mode(mode)).unwrap();
        let changes_owner = std::os::unix::fs::chown(&fixture.path, Some(1234), Some(4321)).is_ok();
        assert!(fixture.store().save(&token(u64::from(mode))).unwrap());
        let found = fs::metadata(&fixture.path).unwrap();
        assert_eq!(found.mode() & 0o7777, mode);
        if changes_owner {
            assert_eq!((found.uid(), found.gid()), (1234, 4321));
        }
    }
}

#[test]
fn a_symbolic_link_stays_and_its_target_is_written() {
    let target = Fixture::new("A=1\n");
    let link = Fixture::empty();
    symlink(&target.path, &link.path).unwrap();
    assert!(link.store().save(&token(1)).unwrap());
    assert!(fs::symlink_metadata(&link.path).unwrap().is_symlink());
    assert_eq!(target.store().load().unwrap(), Some(token(1)));
    assert_eq!(target.names(), [".env"]);
    assert_eq!(link.names(), [".env"]);
}

#[test]
fn a_dangling_link_is_a_missing_file() {
    let fixture = Fixture::empty();
    symlink("real.env", &fixture.path).unwrap();
    assert!(!fixture.store().save(&token(1)).unwrap());
    let store = EnvFile::new(fixture.path.clone(), true);
    assert!(store.save(&token(1)).unwrap());
    assert!(fixture.folder.path().join("real.env").is_file());
    assert_eq!(store.load().unwrap(), Some(token(1)));
}

#[test]
fn a_missing_file_is_created_for_us_alone_and_only_on_demand() {
    let fixture = Fixture::empty();
    assert_eq!(fixture.store().load().unwrap(), None);
    assert!(!fixture.store().save(&token(1)).unwrap());
    assert!(fixture.names().is_empty());
    let store = EnvFile::new(fixture.path.clone(), true);
    assert!(store.save(&token(1)).unwrap());
    assert!(!store.save(&token(1)).unwrap());
    let mode = fs::metadata(&fixture.path).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_eq!(store.load().unwrap(), Some(token(1)));
    assert_eq!(fixture.names(), [".env"]);
}

#[test]
fn what_is_no_regular_file_is_left_alone() {
    let fixture = Fixture::empty();
    fs::create_dir(&fixture.path).unwrap();
    for path in [fixture.path.clone(), PathBuf::from("/dev/null")] {
        let store = EnvFile::new(path, true);
        let error = store.save(&token(1)).unwrap_err().to_string();
        assert!(error.contains("not a regular file") && error.contains("ENV_FILE"));
        store.load().unwrap_err();
    }
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

#[test]
fn a_folder_that_does_not_exist_is_an_error_only_when_asked_to_create() {
    let fixture = Fixture::empty();
    let path = fixture.folder.path().join("no/such/.env");
    assert!(!EnvFile::new(path.clone(), false).save(&token(1)).unwrap());
    EnvFile::new(path, true).save(&token(1)).unwrap_err();
}

#[test]
fn what_a_killed_writer_left_is_removed_and_nothing_else() {
    let fixture = Fixture::new("A=1\n");
    for name in [".env.abc123.token-sidecar", ".env.local", ".other.x.token-sidecar"] {
        fs::write(fixture.folder.path().join(name), "x").unwrap();
    }
    assert!(fixture.store().save(&token(1)).unwrap());
    let mut names = fixture.names();
    names.sort();
    assert_eq!(names, [".env", ".env.local", ".other.x.token-sidecar"]);
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let fixture = Fixture::new(surrounded("A=1"));
    thread::scope(|scope| {
        for writer in 0..4 {
            let store = fixture.store();
            scope.spawn(move || {
                for n in 0..20 {
                    store.save(&token(writer * 100 + n)).unwrap();
                }
            });
        }
    });
    let written = fixture.store().load().unwrap().unwrap();
    let expected = text::with_token(&surrounded("A=1"), &written, Length::Natural);
    assert_eq!(fixture.content(), expected.unwrap());
    assert_eq!(fixture.names(), [".env"]);
}

/// A file mounted over the fixture's; unmounted on drop.
struct Mounted(PathBuf);

impl Mounted {
    /// `None` where mounting is not permitted.
    fn new(source: &Path, target: &Path, read_only: bool) -> Option<Self> {
        let mount = |arguments: &[&str]| {
            let mut command = Command::new("mount");
            let command = command.args(arguments).arg(target).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let done = mount(&["--bind", source.to_str()?]);
        let mounted = done.then(|| Self(target.to_owned()));
        if mounted.is_none() {
            eprintln!("skipped: mounting is not permitted here");
        } else if read_only {
            assert!(mount(&["-o", "remount,ro,bind"]));
        }
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_mounted_file_is_written_in_place() {
    let source = Fixture::new(surrounded(&format!("{}=", text::VARIABLE)));
    let fixture = Fixture::new("");
    let Some(_mounted) = Mounted::new(&source.path, &fixture.path, false) else {
        return;
    };
    let identity = fs::metadata(&source.path).unwrap().ino();
    for n in [1, 22_222_222, 3] {
        let length = source.content().len();
        assert!(fixture.store().save(&token(n)).unwrap());
        assert_eq!(source.store().load().unwrap(), Some(token(n)));
        assert!(source.content().len() >= length);
        assert!(source.content().ends_with(b"# no token here"));
    }
    assert!(!fixture.store().save(&token(3)).unwrap());
    assert_eq!(fs::metadata(&source.path).unwrap().ino(), identity);
    assert_eq!(fixture.names(), [".env"]);
}

#[test]
fn a_file_mounted_read_only_is_an_error_and_unchanged() {
    let source = Fixture::new("A=1\n");
    let fixture = Fixture::new("");
    let Some(_mounted) = Mounted::new(&source.path, &fixture.path, true) else {
        return;
    };
    let error = fixture.store().save(&token(1)).unwrap_err().to_string();
    assert!(error.contains("cannot write the env file"), "{error}");
    assert_eq!(source.content(), b"A=1\n");
    assert_eq!(fixture.names(), [".env"]);
}

/// Without an effect unless [`Writer`] has started it: then it saves tokens to
/// the `.env` of its working folder until it is killed, or once.
#[test]
#[ignore = "a process that other tests start"]
fn writer() {
    let Ok(orders) = fs::read_to_string("writer-orders") else {
        return;
    };
    let path = Path::new(".env");
    let store = EnvFile::new(path.to_owned(), false);
    for n in 0.. {
        let saved = match &*orders {
            "in place" => write_in_place(path, &token(n)).is_ok(),
            _ => store.save(&token(n)).is_ok(),
        };
        assert!(saved);
        if orders == "once" {
            return;
        }
    }
}

/// This test binary as a process that writes. Killed on drop.
struct Writer(Child);

impl Writer {
    fn start(fixture: &Fixture, orders: &str, user: Option<u32>) -> Self {
        fs::write(fixture.folder.path().join("writer-orders"), orders).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "token::env_file::tests::writer", "--ignored", "--quiet"])
            .current_dir(&fixture.folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        Self(command.spawn().unwrap())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Kills writers at random moments of their work. After each, the file must be
/// what one of their writes has made of it.
fn kill_writers(orders: &str, kills: usize) {
    let fixture = Fixture::new(surrounded(&format!("{}='x'", text::VARIABLE)));
    let original = fixture.content();
    for _ in 0..kills {
        let before = fixture.content();
        let mut writer = Writer::start(&fixture, orders, None);
        while fixture.content() == before {
            assert!(writer.0.try_wait().unwrap().is_none(), "the writer gave up");
            thread::sleep(Duration::from_micros(200));
        }
        thread::sleep(Duration::from_micros(fastrand::u64(..3000)));
        drop(writer);
        let token = fixture.store().load().unwrap().expect("a whole token");
        let expected = text::with_token(&original, &token, Length::Natural);
        assert_eq!(unfilled(&fixture.content()), unfilled(&expected.unwrap()));
    }
    fixture.store().save(&token(u64::MAX)).unwrap();
    let mut names = fixture.names();
    names.sort();
    assert_eq!(names, [".env", "writer-orders"]);
}

#[test]
fn killed_writers_leave_the_file_whole() {
    kill_writers("replace", 700);
}

#[test]
fn killed_writers_in_place_leave_the_file_whole() {
    kill_writers("in place", 300);
}

/// As another user, in a folder that this user may not write.
fn save_as_nobody(mode: u32, owner: u32) -> Option<(Fixture, bool)> {
    let fixture = Fixture::new(surrounded("A=1"));
    let open = fs::Permissions::from_mode;
    fs::set_permissions(fixture.folder.path(), open(0o755)).unwrap();
    fs::set_permissions(&fixture.path, open(mode)).unwrap();
    if std::os::unix::fs::chown(&fixture.path, Some(owner), Some(owner)).is_err() {
        eprintln!("skipped: needs root");
        return None;
    }
    let mut writer = Writer::start(&fixture, "once", Some(NOBODY));
    let done = writer.0.wait().unwrap().success();
    Some((fixture, done))
}

#[test]
fn a_writable_file_in_a_read_only_folder_is_written_in_place() {
    let Some((fixture, done)) = save_as_nobody(0o600, NOBODY) else {
        return;
    };
    assert!(done);
    assert_eq!(fixture.store().load().unwrap(), Some(token(0)));
}

#[test]
fn a_read_only_file_in_a_read_only_folder_stays_as_it_is() {
    let Some((fixture, done)) = save_as_nobody(0o644, 0) else {
        return;
    };
    assert!(!done);
    assert_eq!(fixture.content(), surrounded("A=1"));
}
