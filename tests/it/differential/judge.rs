//! Whether the sidecar, the taps, the servers and the clients say the same.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use serde_json::Value;
use tokio::time::timeout;

use super::servers::Tap;
use super::streams::{Fate, Message};
use super::strict::Seen;
use super::{Answer, Outcome, Side};
use crate::support::http::{PATIENCE, text};
use crate::support::{World, until};

/// Fields that never cross.
const STOPPED: [&str; 6] = [
    "proxy-authorization",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authentication-info",
    "keep-alive",
    "http2-settings",
];

/// Fields that no trailer section may bring.
const STOPPED_TRAILERS: [&str; 6] =
    ["authorization", "content-length", "transfer-encoding", "host", "proxy-authorization", "te"];

/// The key in a target.
fn key(target: &str) -> Option<String> {
    let from = &target[target.find("stream-")?..];
    Some(from.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect())
}

/// What the sidecar says it answered.
fn answered(world: &World) -> Vec<Value> {
    let mut events = world.sidecar.events();
    events.retain(|event| {
        event["message"] == "request answered" && event["http.method"] != "CONNECT"
    });
    events
}

/// The keys of what the sidecar says it sent once more, how often.
fn sent_again(world: &World) -> HashMap<String, usize> {
    let mut again = HashMap::new();
    for event in world.sidecar.events() {
        if event["message"] == "request sent again on a fresh connection" {
            let target = event["http.target"].as_str().unwrap_or_default();
            *again.entry(key(target).unwrap_or_default()).or_default() += 1;
        }
    }
    again
}

/// Gathers what is wrong.
pub(crate) struct Judge {
    token: String,
    /// By key, the statuses that the sidecar says it answered with.
    claims: HashMap<String, Vec<u64>>,
    /// By key, how often the sidecar says it sent one again since it had got no answer.
    again: HashMap<String, usize>,
    faults: Vec<(Option<u64>, String)>,
    seen: usize,
    ids: HashSet<String>,
}

impl Judge {
    pub(crate) async fn new(world: &World) -> Self {
        let counted = world.sidecar.metric("sidecar_requests_total", &[]).await;
        #[expect(clippy::cast_precision_loss, reason = "there are not that many")]
        let all = async || answered(world).len() as f64 >= counted;
        // The last lines may still be on their way.
        let _ = timeout(PATIENCE / 2, until("the log", all)).await;
        let answered = answered(world);
        let mut claims: HashMap<String, Vec<u64>> = HashMap::new();
        for event in &answered {
            let key = key(event["http.target"].as_str().unwrap_or_default()).unwrap_or_default();
            claims.entry(key).or_default().push(event["http.status"].as_u64().unwrap_or(0));
        }
        let mut judge = Self {
            token: world.token.clone(),
            claims,
            again: sent_again(world),
            faults: Vec::new(),
            seen: 0,
            ids: HashSet::new(),
        };
        #[expect(clippy::cast_precision_loss, reason = "there are not that many")]
        let logged = answered.len() as f64;
        if (counted - logged).abs() > 0.5 {
            judge.fault(None, format!("{counted} requests counted, {logged} logged"));
        }
        judge
    }

    fn fault(&mut self, seed: Option<u64>, what: impl Into<String>) {
        self.faults.push((seed, what.into()));
    }

    pub(crate) async fn judge(&mut self, side: &Side, outcomes: &[&Outcome]) {
        let taps = [&side.plain, &side.tls];
        let mut seen = Vec::new();
        for tap in taps {
            match tap.requests() {
                Ok(requests) => {
                    for request in &requests {
                        self.judge_fields(side, request, tap);
                    }
                    seen.extend(requests);
                }
                Err(error) => self.fault(None, format!("{}: {error}", side.server.name)),
            }
        }
        self.seen += seen.len();
        // A server may note a request only once its body has come.
        let all = async || side.server.seen().len() >= seen.len();
        let _ = timeout(PATIENCE / 2, until("the server's log", all)).await;
        self.judge_server(side, &seen);
        let by_key: HashMap<String, &Seen> =
            seen.iter().filter_map(|request| Some((key(&request.start)?, request))).collect();
        for message in outcomes.iter().flat_map(|outcome| outcome.stream.sound()) {
            self.judge_body(message, &by_key);
        }
        let mut keys: HashMap<String, usize> = HashMap::new();
        for request in &seen {
            *keys.entry(key(&request.start).unwrap_or_default()).or_default() += 1;
        }
        for (key, came) in &mut keys {
            // The same request, although it was written twice.
            *came = came.saturating_sub(self.again.get(key).copied().unwrap_or(0)).max(1);
        }
        for outcome in outcomes {
            self.judge_stream(outcome, &keys);
            self.judge_answers(outcome, &keys);
        }
        self.judge_claims(outcomes, &keys);
    }

    /// The server saw what the sidecar wrote, and nothing else.
    fn judge_server(&mut self, side: &Side, seen: &[Seen]) {
        let name = side.server.name;
        let mut written: HashMap<String, Vec<&Seen>> = HashMap::new();
        for request in seen {
            written.entry(request.start.clone()).or_default().push(request);
        }
        for said in side.server.seen() {
            let start = said["request"].as_str().unwrap_or_default();
            // Bytes above ASCII are shown by each in its own way.
            let ascii = |text: &str| text.chars().filter(char::is_ascii).collect::<String>();
            let found = written.iter_mut().find_map(|(key, requests)| {
                (key == start || (!start.is_ascii() && ascii(key) == ascii(start)))
                    .then(|| requests.pop())
            });
            let Some(Some(request)) = found else {
                self.fault(seed(start), format!("{name} saw one that was not sent: {said}"));
                continue;
            };
            if said["length"].is_u64() && request.whole {
                let sum: u64 = request.body.iter().map(|byte| u64::from(*byte)).sum();
                if said["length"] != request.body.len() || said["sum"] != sum {
                    self.fault(
                        seed(start),
                        format!("{name} read another body: {said} {request:?}"),
                    );
                }
            }
            if let Some(fields) = said["fields"].as_array() {
                let fields: Vec<(&str, &str)> = fields
                    .iter()
                    .map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap().trim()))
                    .collect();
                let sent: Vec<(&str, &str)> =
                    request.fields.iter().map(|(n, v)| (n.as_str(), v.trim())).collect();
                if fields != sent {
                    self.fault(seed(start), format!("{name} read {fields:?}, sent {sent:?}"));
                }
            }
            self.judge_noted(name, &said);
        }
        let mut again = self.again.clone();
        for request in written.values().flatten() {
            // The connection of one that was sent again had ended, perhaps before it came.
            let excused = key(&request.start).and_then(|key| again.remove(&key));
            if excused.is_none() {
                self.fault(seed(&request.start), format!("{name} did not see {request:?}"));
            }
        }
    }

    /// What nginx says of fields that should have stopped.
    fn judge_noted(&mut self, name: &str, said: &Value) {
        let Some(said) = said.as_object() else { return };
        for (field, value) in said.iter().filter(|(_, value)| *value != "") {
            let stops = field.starts_with("proxy_")
                || field.starts_with("x_named")
                || field == "keep_alive"
                || (field == "te" && value != "trailers")
                || (field == "transfer_encoding" && value != "chunked");
            if stops {
                let start = said["request"].as_str().unwrap_or_default();
                self.fault(seed(start), format!("{name} saw {field}: {value}"));
            }
        }
    }

    /// No field is there that should have stopped.
    fn judge_fields(&mut self, side: &Side, request: &Seen, tap: &Tap) {
        let seed = seed(&request.start);
        let upgrades = request.values("upgrade").iter().all(|value| *value == "websocket");
        for (name, value) in &request.fields {
            let lower = name.to_ascii_lowercase();
            let fine = match lower.as_str() {
                name if STOPPED.contains(&name) || name.starts_with("x-named") => false,
                "te" => value.eq_ignore_ascii_case("trailers"),
                "upgrade" => value == "websocket",
                "connection" => {
                    ["close", "keep-alive"].contains(&value.to_ascii_lowercase().as_str())
                        || (upgrades && value.eq_ignore_ascii_case("upgrade"))
                }
                _ => true,
            };
            if !fine {
                self.fault(seed, format!("{name}: {value} came in {}", request.start));
            }
        }
        for (name, _) in &request.trailers {
            if STOPPED_TRAILERS.contains(&name.to_ascii_lowercase().as_str()) {
                self.fault(seed, format!("trailer {name} came in {}", request.start));
            }
        }
        let hosts = request.values("host");
        let is_api = std::ptr::eq(tap, &raw const side.tls);
        let host = if is_api { side.goal.api } else { &side.goal.address };
        if hosts != [host] {
            self.fault(seed, format!("hosts {hosts:?} came in {}", request.start));
        }
        let ours = format!("Bearer {}", self.token);
        let authorized = request.values("authorization");
        if is_api && authorized != [ours.as_str()] {
            self.fault(seed, format!("{authorized:?} came in {}", request.start));
        }
        if !is_api && request.fields.iter().any(|(_, value)| value.contains(&self.token)) {
            self.fault(seed, format!("the token went elsewhere: {}", request.start));
        }
    }

    /// The body arrives as it was meant.
    fn judge_body(&mut self, message: &Message, seen: &HashMap<String, &Seen>) {
        let Some(request) = seen.get(&message.key) else { return };
        if message.body.as_ref().is_some_and(|body| *body != request.body || !request.whole) {
            self.fault(seed(&message.key), format!("another body came: {request:?}"));
        }
    }

    /// What must arrive did, what must not did not.
    fn judge_stream(&mut self, outcome: &Outcome, keys: &HashMap<String, usize>) {
        let (stream, seed) = (&outcome.stream, Some(outcome.stream.seed));
        let count = |key: &str| keys.get(key).copied().unwrap_or(0);
        for message in &stream.messages {
            for key in [&message.key, &format!("{}-smuggled", message.key)] {
                if count(key) > 1 {
                    self.fault(seed, format!("{key} came {} times", count(key)));
                }
            }
        }
        for message in outcome.certain() {
            if count(&message.key) != 1 {
                self.fault(seed, format!("{} did not come", message.key));
            }
            if count(&format!("{}-smuggled", message.key)) != 0 {
                self.fault(seed, format!("what was inside of {} came", message.key));
            }
        }
        for message in stream.barred() {
            let inside = format!("{}-smuggled", message.key);
            let stays = message.fate == Fate::Declined || count(&inside) == 0;
            if count(&message.key) != 0 || !stays {
                self.fault(seed, format!("{} came, or what is in it, and must not", message.key));
            }
        }
        if !outcome.ended {
            self.fault(seed, "the connection was not ended");
        }
    }

    /// The client got its own answers, and not too many.
    fn judge_answers(&mut self, outcome: &Outcome, keys: &HashMap<String, usize>) {
        let (stream, seed) = (&outcome.stream, Some(outcome.stream.seed));
        let answers = match &outcome.answers {
            Ok(answers) => answers,
            Err(error) => return self.fault(seed, error),
        };
        let own = format!("stream-{}-", stream.seed);
        let from_server: Vec<&Answer> =
            answers.iter().filter(|answer| answer.from_server).collect();
        for answer in &from_server {
            let is_own = answer.seen.is_empty()
                || answer.seen.contains(&own)
                || !answer.seen.contains("stream-");
            if !is_own {
                self.fault(seed, format!("got the answer to {:?}", answer.seen));
            }
            if let Some(id) = &answer.id
                && !self.ids.insert(id.clone())
            {
                self.fault(seed, format!("answer {id} came twice"));
            }
        }
        // Junk that follows a broken message gets an answer of its own, once.
        let came =
            keys.iter().filter(|(key, _)| key.starts_with(&own)).map(|(_, n)| n).sum::<usize>();
        let anonymous = from_server.iter().filter(|answer| key(&answer.seen).is_none()).count();
        if answers.len() > stream.heads + 1 || from_server.len() > came + anonymous {
            self.fault(seed, format!("{} answers, {came} requests came", answers.len()));
        }
        if outcome.certain().len() == stream.messages.len() {
            let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
            let expected = stream.messages.len();
            if answers.len() != expected || from_server.len() != expected {
                self.fault(seed, format!("{expected} messages, answers {statuses:?}"));
            }
            for (message, answer) in stream.messages.iter().zip(answers) {
                // Of what it refused, nginx says little.
                if key(&answer.seen).is_some_and(|key| key != message.key) {
                    self.fault(
                        seed,
                        format!("{} got the answer to {:?}", message.key, answer.seen),
                    );
                }
            }
        }
    }

    /// The sidecar says the same as the server.
    fn judge_claims(&mut self, outcomes: &[&Outcome], keys: &HashMap<String, usize>) {
        let mut faults = Vec::new();
        let of_cut: HashSet<u64> = outcomes
            .iter()
            .filter(|outcome| outcome.cut)
            .map(|outcome| outcome.stream.seed)
            .collect();
        for (key, came) in keys.iter().filter(|(key, _)| !key.is_empty()) {
            let claimed = self.claims.get(key).map_or(0, Vec::len);
            // Of a request whose client has left, the sidecar says nothing.
            let left = seed(key).is_some_and(|seed| of_cut.contains(&seed));
            if claimed < *came && !left {
                faults
                    .push((seed(key), format!("{key} came {came} times, claimed {claimed} times")));
            }
        }
        let own: HashSet<u64> = outcomes.iter().map(|outcome| outcome.stream.seed).collect();
        for (key, statuses) in &self.claims {
            let answered = statuses.iter().filter(|status| (200..300).contains(*status)).count();
            let came = keys.get(key).copied().unwrap_or(0);
            if seed(key).is_some_and(|seed| own.contains(&seed)) && answered > came {
                faults.push((seed(key), format!("{key} came {came} times, answered {statuses:?}")));
            }
        }
        self.faults.extend(faults);
    }

    /// Fails with the streams that something is wrong with.
    pub(crate) fn tell(self, outcomes: &[Outcome]) {
        let sound = outcomes.iter().filter(|outcome| outcome.stream.is_sound()).count();
        let barred = outcomes.iter().filter(|outcome| !outcome.stream.barred().is_empty()).count();
        let cut = outcomes.iter().filter(|outcome| outcome.cut).count();
        let (count, seen, faults) = (outcomes.len(), self.seen, self.faults.len());
        let again = self.again.values().sum::<usize>();
        println!(
            "{count} streams ({sound} sound, {barred} with something to be refused, {cut} cut), \
             {seen} requests arrived, {again} sent again, {faults} faults"
        );
        let mut note = String::new();
        let mut told = HashSet::new();
        for (seed, what) in &self.faults {
            if told.len() > 20 || (seed.is_some() && !told.insert(seed)) {
                continue;
            }
            let _ = writeln!(note, "- {what}");
            let outcome = outcomes.iter().find(|outcome| Some(outcome.stream.seed) == *seed);
            if let Some(Outcome { stream, answers, cut, .. }) = outcome {
                let statuses: Vec<u16> =
                    answers.iter().flatten().map(|answer| answer.status).collect();
                let fates: Vec<_> = stream
                    .messages
                    .iter()
                    .map(|message| (message.fate, &message.changes))
                    .collect();
                let shown: String = text(&stream.bytes).escape_debug().take(3000).collect();
                let _ = writeln!(
                    note,
                    "  seed {} by {:?}, {fates:?}, answers {statuses:?}, cut {cut}, cuts {:?}\n  {shown}",
                    stream.seed, stream.way, stream.cuts
                );
            }
        }
        assert!(self.faults.is_empty(), "{faults} faults, the first of them:\n{note}");
    }
}

/// The seed of the stream that a key or a target belongs to.
fn seed(text: &str) -> Option<u64> {
    key(text)?.split('-').nth(1)?.parse().ok()
}
