//! Where tokens come from: the solver's health, and with `--solve` a token.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::report::Check;
use super::{Patient, readable};
use crate::refresh::{Judgement, Rehearsal};

/// `/health` waits in the queue of the solves, but a person does not wait for ever.
const HEALTH_LIMIT: Duration = Duration::from_secs(10);
/// What the sources may take together beyond `SOLVE_TIMEOUT`.
const SOLVE_SLACK: Duration = Duration::from_secs(90);

/// Asks FlareSolverr whether it is well; no solve.
pub(super) async fn solver(patient: &Patient) -> Check {
    let Some(url) = &patient.config.refresh.flaresolverr_url else {
        return Check::skipped("flaresolverr", "FlareSolverr", "FLARESOLVERR_URL is not set");
    };
    let address = url.authority().map_or("", |authority| authority.as_str());
    let tried = format!("/health of FlareSolverr at {address}, no solve");
    let started = Instant::now();
    match timeout(HEALTH_LIMIT, patient.probes.refresher.probe_solver()).await {
        Err(_) => {
            let found = format!("no answer within {}", readable(HEALTH_LIMIT));
            let advice =
                "it is busy with several solves, which lasts a minute, or wedged: restart it";
            Check::failed("flaresolverr", tried, found, advice)
        }
        Ok(None) => Check::skipped("flaresolverr", tried, "not one of the TOKEN_SOURCES"),
        Ok(Some(Err(error))) => {
            let advice = "is it running, and is FLARESOLVERR_URL right as seen from here?";
            Check::failed("flaresolverr", tried, error, advice)
        }
        Ok(Some(Ok(()))) => {
            let found = format!("well, after {}", readable(started.elapsed()));
            Check::ok("flaresolverr", tried, found)
        }
    }
}

/// Asks the sources for a token, if that is wanted; it is verified and thrown away.
pub(super) async fn solve(patient: &Patient) -> Check {
    let names: Vec<_> = patient.config.refresh.sources.iter().map(|kind| kind.as_str()).collect();
    let tried = format!("a new token from {}, not saved", names.join(", "));
    if !patient.solve {
        return Check::skipped("solve", tried, "only with --solve");
    }
    let limit = patient.config.refresh.solve_timeout.saturating_add(SOLVE_SLACK);
    match timeout(limit, patient.probes.refresher.rehearse()).await {
        Err(_) => {
            let found = format!("none within {}", readable(limit));
            Check::failed("solve", tried, found, "the checks above say which source hangs")
        }
        Ok(Err(error)) => Check::failed("solve", tried, error, "the checks above say more"),
        Ok(Ok(rehearsal)) => rehearsed(tried, &rehearsal),
    }
}

fn rehearsed(tried: String, rehearsal: &Rehearsal) -> Check {
    let Rehearsal { source, token, judgement, took } = rehearsal;
    let (source, token, took) = (source.as_str(), token.fingerprint(), readable(*took));
    let found = format!("{token} from {source} after {took}");
    match judgement {
        Judgement::Good => Check::ok("solve", tried, format!("{found}, the API takes it")),
        Judgement::Cleared => {
            Check::ok("solve", tried, format!("{found}, the API takes it with its clearance"))
        }
        Judgement::Bad | Judgement::Walled | Judgement::Unknown => Check::warning(
            "solve",
            tried,
            format!("{found}, the verifier cannot tell whether it works"),
            "see the verifier above",
        ),
    }
}
