//! The verifier, and what it thinks of the stored token.

use super::report::Check;
use super::upstream::with_causes;
use super::{Patient, now};
use crate::refresh::Judgement;
use crate::token::{Clearance, Token};

const SET: &str =
    "set VERIFY_URL to an address that answers 200 with a good token and 401 without one";
const UNANSWERED: &str = "the lines `dns` and `upstream` say what is in the way";

/// Calibrates the verifier, then has it judge the stored token.
pub(super) async fn examine(patient: &Patient) -> Vec<Check> {
    let calibrated = calibration(patient).await;
    vec![calibrated, stored_token(patient).await]
}

async fn calibration(patient: &Patient) -> Check {
    let tried = "VERIFY_URL without a token";
    let status = match patient.probes.refresher.probe_verifier().await {
        Ok(status) => status,
        Err(error) => return Check::warning("verifier", tried, with_causes(&error), UNANSWERED),
    };
    let found = format!("HTTP {status}");
    match status {
        401 => Check::ok("verifier", tried, format!("{found}, as it should")),
        403 => {
            let found = format!("{found}: the anti-bot wall is in between");
            Check::warning("verifier", tried, found, past_the_wall(patient))
        }
        200 => {
            let found = format!("{found}: it cannot tell a good token from a bad one");
            Check::warning("verifier", tried, found, SET)
        }
        _ => {
            let found = format!("{found}: no telling whether it can tell tokens apart");
            Check::warning("verifier", tried, found, SET)
        }
    }
}

/// How to get past the wall. What brings no browser along brings no clearance.
pub(super) fn past_the_wall(patient: &Patient) -> &'static str {
    match patient.config.refresh.flaresolverr_url {
        Some(_) => "the next refresh by FlareSolverr brings a clearance: `token-sidecar refresh`",
        None => "set FLARESOLVERR_URL: only a solver's browser brings a clearance",
    }
}

async fn stored_token(patient: &Patient) -> Check {
    let Some((token, clearance)) = newest(patient).await else {
        let advice = "start the sidecar, or `token-sidecar refresh`";
        return Check::warning(
            "token",
            "VERIFY_URL with the stored token",
            "there is none",
            advice,
        );
    };
    let tried = format!("VERIFY_URL with the stored token {}", token.fingerprint());
    match patient.probes.refresher.probe_token(&token, &clearance).await {
        Judgement::Good => Check::ok("token", tried, "the API takes it"),
        Judgement::Cleared => Check::ok("token", tried, "the API takes it with its clearance"),
        Judgement::Bad => {
            Check::failed("token", tried, "the API refuses it", "`token-sidecar refresh`")
        }
        Judgement::Walled => {
            let found = "the anti-bot wall is in between";
            Check::failed("token", tried, found, past_the_wall(patient))
        }
        Judgement::Unknown => {
            Check::warning("token", tried, "no telling", "see the verifier above")
        }
    }
}

/// The live token that was issued last, of those in the stores.
async fn newest(patient: &Patient) -> Option<(Token, Clearance)> {
    let in_redis = match &patient.probes.redis {
        Some(redis) => redis.load().await.ok().flatten(),
        None => None,
    };
    let in_redis = in_redis.map(|stored| (stored.token, stored.clearance));
    let in_file = patient.probes.env_file.load().ok().flatten();
    let in_file = in_file.map(|token| (token, Clearance::default()));
    let found = [in_file, in_redis].into_iter().flatten();
    // Of two that are the same, the one with its clearance.
    found.filter(|(token, _)| token.is_live(now())).max_by_key(|(token, _)| token.issued_at())
}
