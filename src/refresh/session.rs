//! A browser session at FlareSolverr, for cookies that come late.
//!
//! Without a session the cookies are read as soon as the page is there, and
//! `returnOnlyCookies` skips the pause: what a script sets some seconds later
//! is got only by opening the page twice in one browser.
//!
//! # Invariants
//!
//! - From the moment a session is asked for, it is destroyed whatever happens:
//!   a failure at any step, a hang, a panic, the solve's own cancellation. It
//!   is a browser of half a gigabyte that nobody else would ever close.
//! - Its end is waited for by nobody and fails nothing.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::runtime::Handle;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::error::SourceError;
use super::flaresolverr::FlareSolverr;
use super::solution::{self, Found};

/// How long the browser stays on the page before its cookies count.
const WAIT_SECONDS: u64 = 5;
/// A server that is busy must be asked again, and a session whose making was
/// not waited for may come to be a little later.
const DESTROY_TRIES: u32 = 5;
/// From the first try to the next; doubled each time.
const DESTROY_PAUSE: Duration = Duration::from_millis(500);

/// Has the page opened in a session: waits on it, and reads its cookies.
///
/// # Errors
///
/// [`SourceError`] of the first step that failed; the session is destroyed all
/// the same, in the background.
pub(super) async fn solve(solver: &Arc<FlareSolverr>) -> Result<Found, SourceError> {
    let session = Session::create(solver).await?;
    let name = &session.name;
    match solver.get(&json!({ "session": name, "waitInSeconds": WAIT_SECONDS })).await {
        Err(SourceError::NoCookie) => {
            solver.get(&json!({ "session": name, "returnOnlyCookies": true })).await
        }
        // Newer servers read the cookies after the wait.
        found => found,
    }
}

/// A session; dropping it has it destroyed.
struct Session {
    solver: Arc<FlareSolverr>,
    /// Ours, until the server says otherwise.
    name: String,
    /// Whether the server has answered the wish for it.
    answered: bool,
    /// Where the task runs that destroys it.
    handle: Handle,
}

impl Session {
    async fn create(solver: &Arc<FlareSolverr>) -> Result<Self, SourceError> {
        let mut session = Self {
            solver: Arc::clone(solver),
            // Another sidecar in the same session would mix up the answers.
            name: format!("token-sidecar-{:016x}", fastrand::u64(..)),
            answered: false,
            handle: Handle::current(),
        };
        let command = json!({ "cmd": "sessions.create", "session": session.name });
        let created = solver.command(solver.proxied(command)).await;
        session.answered = !matches!(created, Err(SourceError::TimedOut(_)));
        let (status, reply) = created?;
        session.name = solution::session_name(status, &reply, &session.name)?;
        Ok(session)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let end = destroy(Arc::clone(&self.solver), mem::take(&mut self.name), self.answered);
        // In a task: what ends the solve must not end this.
        self.solver.tasks.spawn_on(end, &self.handle);
    }
}

/// `made`: the session is there, so "it does not exist" is its end, too.
async fn destroy(solver: Arc<FlareSolverr>, name: String, made: bool) {
    let mut pause = DESTROY_PAUSE;
    for _ in 0..DESTROY_TRIES {
        let command = json!({ "cmd": "sessions.destroy", "session": name });
        match solver.command(command).await {
            Ok(_) => return debug!(session = name, "session of the solver destroyed"),
            Err(error) if made && error.to_string().contains("exist") => return,
            Err(error) => debug!(%error, session = name, "session of the solver not destroyed"),
        }
        sleep(pause).await;
        pause *= 2;
    }
    warn!(session = name, "session of the solver may be left open");
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::panic::AssertUnwindSafe;

    use futures_util::FutureExt;
    use serde_json::Value;
    use tokio::sync::Notify;
    use url::Url;

    use super::super::testing::{self, Origin, Seen, jwt};
    use super::*;

    /// What the solver does at one step.
    #[derive(Clone)]
    enum Step {
        Says(u16, Value),
        /// Something that is not JSON.
        Garbage,
        Hangs,
    }

    impl Step {
        fn ok(reply: Value) -> Self {
            Self::Says(200, reply)
        }

        fn fails() -> Self {
            Self::Says(500, json!({ "status": "error", "message": "Error: broken" }))
        }

        fn no_cookie() -> Self {
            Self::ok(json!({ "status": "ok", "solution": { "cookies": [] } }))
        }

        fn created(name: &str) -> Self {
            Self::ok(json!({ "status": "ok", "session": name }))
        }
    }

    /// A solver whose first reply has no cookie, and that then goes by
    /// `steps`; past their end it says yes to everything.
    struct Solver {
        origin: Origin,
        client: Arc<FlareSolverr>,
        /// Notified at each command.
        asked: Arc<Notify>,
    }

    impl Solver {
        async fn start(steps: &[Step]) -> Self {
            let first = [Step::no_cookie()];
            let steps: Arc<Vec<_>> = Arc::new(first.iter().chain(steps).cloned().collect());
            let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let asked = Arc::new(Notify::new());
            let notify = Arc::clone(&asked);
            let origin = Origin::start(move |_| {
                let number = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let yes = Step::ok(json!({ "status": "ok" }));
                let step = steps.get(number).cloned().unwrap_or(yes);
                notify.notify_one();
                async move {
                    match step {
                        Step::Says(status, reply) => testing::json(status, &reply),
                        Step::Garbage => testing::reply(200, "<html>".into()),
                        Step::Hangs => pending().await,
                    }
                }
            })
            .await;
            let mut settings = testing::settings("https://shop.test/");
            settings.flaresolverr_url = Some(Url::parse(&origin.url("")).unwrap());
            let mut client = FlareSolverr::from_settings(&settings).unwrap().unwrap();
            client.call_limit = Duration::from_millis(300);
            Self { origin, client: Arc::new(client), asked }
        }

        fn commands(&self) -> Vec<Value> {
            let body = |seen: &Seen| serde_json::from_slice(&seen.body).unwrap();
            self.origin.requests().iter().map(body).collect()
        }

        /// Waits for `count` commands.
        async fn asked(&self, count: usize) {
            while self.origin.requests().len() < count {
                self.asked.notified().await;
            }
        }

        /// What was sent once all is over: each command in short.
        async fn protocol(&self) -> Vec<String> {
            self.client.close().await;
            self.commands().iter().map(in_short).collect()
        }
    }

    fn in_short(command: &Value) -> String {
        let mut words = vec![command["cmd"].as_str().unwrap().to_owned()];
        if command["session"].as_str().is_some_and(|name| name.starts_with("token-sidecar-")) {
            words.push("ours".to_owned());
        } else if let Some(name) = command["session"].as_str() {
            words.push(name.to_owned());
        }
        for field in ["waitInSeconds", "returnOnlyCookies"] {
            words.extend(command.get(field).map(|value| format!("{field}={value}")));
        }
        words.join(" ")
    }

    const FIRST: &str = "request.get returnOnlyCookies=true";
    const CREATE: &str = "sessions.create ours";
    const WAIT: &str = "request.get s waitInSeconds=5";
    const READ: &str = "request.get s returnOnlyCookies=true";
    const DESTROY: &str = "sessions.destroy s";
    const DESTROY_OURS: &str = "sessions.destroy ours";

    #[tokio::test]
    async fn a_late_cookie_is_read_in_a_session_that_is_destroyed() {
        let token = jwt("late", 600);
        let found = Step::ok(testing::solved(&token));
        let solver = Solver::start(&[Step::created("s"), Step::no_cookie(), found]).await;
        assert_eq!(solver.client.solve().await.unwrap().token.expose(), token);
        assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, READ, DESTROY]);
        let wait = json!({
            "cmd": "request.get", "url": "https://shop.test/", "maxTimeout": 5000,
            "disableMedia": true, "session": "s", "waitInSeconds": 5,
        });
        assert_eq!(solver.commands()[2], wait);
    }

    #[tokio::test]
    async fn a_server_that_reads_cookies_after_the_wait_is_not_asked_again() {
        let found = Step::ok(testing::solved(&jwt("late", 600)));
        let solver = Solver::start(&[Step::created("s"), found]).await;
        assert!(solver.client.solve().await.is_ok());
        assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, DESTROY]);
    }

    #[tokio::test]
    async fn a_server_that_names_no_session_gets_our_name() {
        let created = Step::ok(json!({ "status": "ok" }));
        let found = Step::ok(testing::solved(&jwt("late", 600)));
        let solver = Solver::start(&[created, found]).await;
        assert!(solver.client.solve().await.is_ok());
        let commands = [FIRST, CREATE, "request.get ours waitInSeconds=5", DESTROY_OURS];
        assert_eq!(solver.protocol().await, commands);
        let names: Vec<_> = solver.commands()[1..].iter().map(|c| c["session"].clone()).collect();
        assert!(names.iter().all(|name| *name == names[0]), "{names:?}");
    }

    #[tokio::test]
    async fn whatever_fails_in_a_session_it_is_destroyed_and_the_error_says_what() {
        let created = || Step::created("s");
        let late = "no answer within 300ms";
        let garbage = "HTTP 200, an answer that cannot be read: it is not JSON";
        let mute = "HTTP 200, an answer that cannot be read: it does not speak of a session";
        let broken = "HTTP 500: Error: broken";
        let no_create = vec![FIRST, CREATE, DESTROY_OURS];
        let no_wait = vec![FIRST, CREATE, WAIT, DESTROY];
        let no_read = vec![FIRST, CREATE, WAIT, READ, DESTROY];
        let table = [
            ("create fails", vec![Step::fails()], broken, &no_create),
            ("create is garbled", vec![Step::Garbage], garbage, &no_create),
            ("create says nothing", vec![Step::ok(json!({}))], mute, &no_create),
            ("create hangs", vec![Step::Hangs], late, &no_create),
            ("the wait fails", vec![created(), Step::fails()], broken, &no_wait),
            ("the wait is garbled", vec![created(), Step::Garbage], garbage, &no_wait),
            ("the wait hangs", vec![created(), Step::Hangs], late, &no_wait),
            ("the read fails", vec![created(), Step::no_cookie(), Step::fails()], broken, &no_read),
            ("the read hangs", vec![created(), Step::no_cookie(), Step::Hangs], late, &no_read),
            (
                "the read has no cookie",
                vec![created(), Step::no_cookie(), Step::no_cookie()],
                "no cookie",
                &no_read,
            ),
        ];
        for (case, steps, expected, commands) in table {
            let solver = Solver::start(&steps).await;
            let error = solver.client.solve().await.unwrap_err();
            let expected = format!("no cookie; asked again in a session: {expected}");
            assert_eq!(error.to_string(), expected, "{case}");
            assert_eq!(&solver.protocol().await, commands, "{case}");
        }
    }

    #[tokio::test]
    async fn an_end_that_fails_spoils_nothing_and_is_tried_again() {
        let busy = Step::Says(429, json!({ "detail": "busy" }));
        for end in [Step::fails(), Step::Garbage, Step::Hangs, busy] {
            let found = Step::ok(testing::solved(&jwt("late", 600)));
            let solver = Solver::start(&[Step::created("s"), found, end]).await;
            assert!(solver.client.solve().await.is_ok());
            assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, DESTROY, DESTROY]);
        }
    }

    #[tokio::test]
    async fn a_session_that_is_gone_already_is_not_destroyed_again() {
        let gone = json!({ "status": "error", "message": "Error: The session doesn't exist." });
        let found = Step::ok(testing::solved(&jwt("late", 600)));
        let steps = [Step::created("s"), found, Step::Says(500, gone)];
        let solver = Solver::start(&steps).await;
        assert!(solver.client.solve().await.is_ok());
        assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, DESTROY]);
    }

    #[tokio::test]
    async fn a_solve_that_is_dropped_has_its_session_destroyed() {
        let solver = Solver::start(&[Step::created("s"), Step::Hangs]).await;
        tokio::select! {
            _ = solver.client.solve() => panic!("it hangs"),
            () = solver.asked(3) => {}
        }
        assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, DESTROY]);
    }

    #[tokio::test]
    async fn a_panic_beside_a_session_has_it_destroyed() {
        let solver = Solver::start(&[Step::created("s")]).await;
        let session = Session::create(&solver.client);
        let panicking = session.map(|created| {
            let _session = created.ok();
            panic!("boom");
        });
        assert!(AssertUnwindSafe(panicking).catch_unwind().await.is_err());
        // The first step of this solver is the reply without a cookie.
        assert_eq!(solver.protocol().await, [CREATE, DESTROY_OURS]);
    }

    #[tokio::test]
    async fn the_end_of_the_process_destroys_the_session_and_fails_no_solve() {
        let solver = Solver::start(&[Step::created("s"), Step::Hangs]).await;
        let client = Arc::clone(&solver.client);
        let solve = tokio::spawn(async move { client.solve().await.map(drop) });
        solver.asked(3).await;
        assert_eq!(solver.protocol().await, [FIRST, CREATE, WAIT, DESTROY]);
        assert!(!solve.is_finished());
    }

    #[tokio::test]
    async fn a_session_that_comes_to_be_after_its_time_is_destroyed_then() {
        let missing = Step::Says(500, json!({ "status": "error", "message": "no such session" }));
        let solver = Solver::start(&[Step::Hangs, missing]).await;
        assert!(solver.client.solve().await.is_err());
        let commands = [FIRST, CREATE, DESTROY_OURS, DESTROY_OURS];
        assert_eq!(solver.protocol().await, commands);
    }

    #[tokio::test]
    async fn what_is_no_lack_of_a_cookie_is_not_asked_again() {
        let odd = json!({ "name": "access-token", "value": "rubbish" });
        let odd = json!({ "status": "ok", "solution": { "cookies": [odd] } });
        for (status, reply) in [(500, json!({ "status": "error" })), (200, odd)] {
            let origin = Origin::start(move |_| {
                let reply = testing::json(status, &reply);
                async move { reply }
            })
            .await;
            let mut settings = testing::settings("https://shop.test/");
            settings.flaresolverr_url = Some(Url::parse(&origin.url("")).unwrap());
            let client = Arc::new(FlareSolverr::from_settings(&settings).unwrap().unwrap());
            assert!(client.solve().await.is_err());
            assert_eq!(origin.requests().len(), 1);
        }
    }
}
