//! The meaning of the scripts, once more in Rust: what the simulation of a
//! fleet runs on. A test runs both on the same random calls and compares.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Call, Operation, RawEntrance, ValueId};

pub(crate) const TOKEN: usize = 0;
pub(crate) const COOKIES: usize = 1;
pub(crate) const META: usize = 2;
pub(crate) const LEASE: usize = 3;
pub(crate) const EPOCH: usize = 4;
pub(crate) const UNVERIFIED: usize = 5;
pub(crate) const BACKOFF: usize = 6;
pub(crate) const DENIED: usize = 7;
pub(crate) const TRIES: usize = 8;
pub(crate) const WAITING: usize = 9;

/// What lies under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Text(Vec<u8>),
    /// Members of a sorted set with their scores, in order.
    Set(Vec<(u64, String)>),
    /// Of a type that has no business there.
    List,
}

#[derive(Clone, Debug)]
struct Cell {
    content: Content,
    /// In milliseconds; none: it stays.
    ends: Option<u64>,
}

/// The answer of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Entrance(Box<RawEntrance>),
    Truth(bool),
    Outcome(&'static str),
}

/// A fault on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Flaw {
    #[default]
    None,
    /// A commit need not come from whoever has the lease.
    Unfenced,
    /// A commit may replace what is newer.
    Ageless,
    /// The next holder gets no epoch of its own.
    Epochless,
    /// A lease never lapses.
    Immortal,
}

/// The keys of a server, by their place in `KEYS`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    cells: BTreeMap<usize, Cell>,
    /// The server's time in milliseconds.
    now: u64,
    /// Who has subscribed.
    pub(crate) listeners: usize,
    /// How many notices have gone out, and the last one.
    pub(crate) told: (u64, Option<(&'static str, u64)>),
    flaw: Flaw,
}

impl Model {
    /// An empty server.
    pub(crate) fn with_flaw(flaw: Flaw) -> Self {
        Self { flaw, ..Self::default() }
    }

    /// Lets time pass until `now`, in milliseconds.
    pub(crate) fn advance(&mut self, now: u64) {
        self.now = self.now.max(now);
        let now = self.now;
        self.cells.retain(|_, cell| cell.ends.is_none_or(|ends| now < ends));
    }

    pub(crate) fn content(&self, key: usize) -> Option<&Content> {
        self.cells.get(&key).map(|cell| &cell.content)
    }

    /// As the server says: -2 without a key, -1 without an end.
    pub(crate) fn left(&self, key: usize) -> i64 {
        let Some(cell) = self.cells.get(&key) else { return -2 };
        cell.ends.map_or(-1, |ends| i64::try_from(ends - self.now).unwrap_or(i64::MAX))
    }

    pub(crate) fn put(&mut self, key: usize, content: Content, life: Option<u64>) {
        let ends = life.map(|life| self.now + life);
        self.cells.insert(key, Cell { content, ends });
    }

    pub(crate) fn delete(&mut self, keys: impl IntoIterator<Item = usize>) {
        for key in keys {
            self.cells.remove(&key);
        }
    }

    pub(crate) fn text(&self, key: usize) -> Option<&[u8]> {
        match self.content(key)? {
            Content::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Runs a script.
    pub(crate) fn run(&mut self, call: &Call) -> Answer {
        let arguments: Vec<_> = call.arguments.iter().map(String::as_str).collect();
        match call.operation {
            Operation::Enter => Answer::Entrance(Box::new(self.enter(&arguments))),
            Operation::Renew => Answer::Truth(self.renew(&arguments)),
            Operation::Release => Answer::Truth(self.release(&arguments)),
            Operation::Commit => Answer::Outcome(self.commit(&arguments)),
            Operation::Share => Answer::Outcome(self.share(&arguments)),
            Operation::HandOn => Answer::Truth(self.hand_on(&arguments)),
            Operation::Fail => Answer::Truth(self.fail(&arguments)),
            Operation::Deny => Answer::Truth(self.deny(&arguments)),
        }
    }

    fn enter(&mut self, arguments: &[&str]) -> RawEntrance {
        let [owner, lease, wish, known_denials, longest_pause, waiting, known @ ..] = arguments
        else {
            panic!()
        };
        let (token, meta) = (self.text(TOKEN).map(<[u8]>::to_vec), self.fitting_meta());
        let unverified = self.object(UNVERIFIED);
        let backoff = self.object(BACKOFF);
        let is_denied = meta.as_ref().is_some_and(|meta| self.is_denied(&meta["sha256"]));
        let is_unverified_denied =
            unverified.as_ref().is_some_and(|shared| self.is_denied(&shared["sha256"]));
        let is_news = |value: &[u8]| !known.contains(&ValueId::of(value).as_str());
        let shared = unverified.as_ref().and_then(|shared| shared["token"].as_str());
        let has_news = token.as_deref().is_some_and(|token| !is_denied && is_news(token))
            || shared.is_some_and(|shared| !is_unverified_denied && is_news(shared.as_bytes()));
        let held_up = backoff
            .is_some_and(|backoff| !(*wish == "needed" && backoff["routine"] == Value::Bool(true)));
        let holder = self.text(LEASE).map(<[u8]>::to_vec);
        let lease = number(lease);
        let (state, detail) = match holder {
            Some(holder) if holder == owner.as_bytes() && *wish != "none" => {
                self.expire(LEASE, lease);
                ("granted", self.last_epoch())
            }
            Some(_) => {
                if *wish != "none" {
                    self.note_waiting(owner, number(waiting));
                }
                ("held", self.left_of_what_lapses(LEASE, lease))
            }
            None if *wish == "force" || *wish != "none" && !has_news && !held_up => {
                let step = u64::from(self.flaw != Flaw::Epochless);
                let epoch = self.last_epoch().max(meta.as_ref().map_or(0, epoch_of)) + step;
                self.put(EPOCH, Content::Text(epoch.to_string().into()), None);
                self.put(LEASE, Content::Text((*owner).into()), Some(lease));
                self.expire(LEASE, lease);
                self.wait_no_more(owner);
                ("granted", epoch)
            }
            None => ("free", 0),
        };
        let backoff_ms = match self.text(BACKOFF) {
            Some(_) => self.left_of_what_lapses(BACKOFF, number(longest_pause)),
            None => 0,
        };
        let last_denial = self.denials().last().map_or(0, |(score, _)| *score);
        let known_denials = number(known_denials);
        let after = if last_denial < known_denials { 0 } else { known_denials };
        let news = self.denials().iter().filter(|(score, _)| *score > after);
        RawEntrance {
            token,
            cookies: self.text(COOKIES).map(<[u8]>::to_vec),
            metadata: self.text(META).map(<[u8]>::to_vec),
            is_denied,
            unverified: self.text(UNVERIFIED).map(<[u8]>::to_vec),
            is_unverified_denied,
            backoff: self.text(BACKOFF).map(<[u8]>::to_vec),
            backoff_ms,
            state: state.to_owned(),
            detail,
            last_denial,
            denials: news.map(|(_, digest)| digest.clone()).collect(),
        }
    }

    fn left_of_what_lapses(&mut self, key: usize, most: u64) -> u64 {
        match u64::try_from(self.left(key)) {
            Ok(left) if left <= most => left,
            _ => {
                self.expire(key, most);
                most
            }
        }
    }

    fn note_waiting(&mut self, owner: &str, life: u64) {
        let mut waiting = match self.content(WAITING) {
            None => Vec::new(),
            Some(Content::Set(members)) => members.clone(),
            Some(_) => return self.delete([WAITING]),
        };
        if !waiting.iter().any(|(_, waits)| waits == owner) {
            waiting.push((0, owner.to_owned()));
            waiting.sort();
        }
        self.put(WAITING, Content::Set(waiting), Some(life));
    }

    fn wait_no_more(&mut self, owner: &str) {
        let Some(Cell { content: Content::Set(waiting), .. }) = self.cells.get_mut(&WAITING) else {
            return;
        };
        waiting.retain(|(_, waits)| waits != owner);
        if waiting.is_empty() {
            self.delete([WAITING]);
        }
    }

    fn renew(&mut self, arguments: &[&str]) -> bool {
        let [owner, lease] = arguments else { panic!() };
        let held = self.is_held_by(owner);
        if held {
            self.expire(LEASE, number(lease));
        }
        held
    }

    fn release(&mut self, arguments: &[&str]) -> bool {
        let [owner] = arguments else { panic!() };
        let held = self.is_held_by(owner);
        if held {
            self.delete([LEASE]);
            self.tell("released", self.last_epoch());
        }
        held
    }

    fn commit(&mut self, arguments: &[&str]) -> &'static str {
        let [owner, epoch, token, cookies, note, ttl, issued, seen] = arguments else { panic!() };
        let (epoch, life) = (number(epoch), number(ttl) * 1000);
        let stored = self.text(TOKEN).map(<[u8]>::to_vec);
        let meta = self.fitting_meta();
        let stored_epoch = meta.as_ref().map_or(0, epoch_of);
        let held = !owner.is_empty() && self.is_held_by(owner);
        let same = stored.as_deref() == Some(token.as_bytes());
        let verified = meta.as_ref().is_some_and(|meta| meta["verified"] == Value::Bool(true));
        let whole = same && verified && self.text(COOKIES) == Some(cookies.as_bytes());
        if !owner.is_empty() && self.flaw != Flaw::Unfenced {
            match (held, whole && stored_epoch == epoch) {
                (false, true) => return "committed",
                (false, false) => return "lost",
                _ if stored_epoch > epoch => return "fenced",
                _ => {}
            }
        }
        let other = stored.filter(|stored| !same && ValueId::of(stored).as_str() != *seen);
        if other.is_some() && self.flaw != Flaw::Ageless {
            let Some(meta) = &meta else { return "foreign" };
            let (theirs, ours) = (issued_of(meta), issued.parse().unwrap_or(-1));
            let older = theirs > ours || owner.is_empty() && theirs == ours;
            if older && !self.is_denied(&meta["sha256"]) {
                return "older";
            }
        }
        let (epoch, sha1) = (epoch.max(stored_epoch), ValueId::of(token.as_bytes()));
        self.put(TOKEN, Content::Text((*token).into()), Some(life));
        self.put(COOKIES, Content::Text((*cookies).into()), Some(life));
        let note = format!(r#"{{"sha1":"{}","epoch":{epoch},{}"#, sha1.as_str(), &note[1..]);
        self.put(META, Content::Text(note.into()), Some(life));
        self.delete([UNVERIFIED, BACKOFF, TRIES, WAITING]);
        if held {
            self.delete([LEASE]);
        }
        if held || !whole {
            self.tell("committed", epoch);
        }
        "committed"
    }

    fn share(&mut self, arguments: &[&str]) -> &'static str {
        let [owner, epoch, note, ttl, issued, sha1] = arguments else { panic!() };
        let (epoch, issued) = (number(epoch), issued.parse().unwrap_or(-1));
        let (meta, shared) = (self.fitting_meta(), self.object(UNVERIFIED));
        if !self.is_held_by(owner) {
            let again = shared.is_some_and(|shared| {
                let token = shared["token"].as_str();
                token.is_some_and(|token| ValueId::of(token.as_bytes()).as_str() == *sha1)
                    && epoch_of(&shared) == epoch
            });
            return if again { "committed" } else { "lost" };
        }
        if meta.as_ref().is_some_and(|meta| epoch_of(meta) > epoch) {
            return "fenced";
        }
        let is_better =
            |other: &Value| issued_of(other) > issued && !self.is_denied(&other["sha256"]);
        if meta.iter().chain(&shared).any(is_better) {
            return "older";
        }
        self.put(UNVERIFIED, Content::Text((*note).into()), Some(number(ttl) * 1000));
        self.delete([LEASE, BACKOFF, TRIES, WAITING]);
        self.tell("committed", epoch);
        "committed"
    }

    fn hand_on(&mut self, arguments: &[&str]) -> bool {
        let [owner, epoch, weight, most, memory] = arguments else { panic!() };
        if !self.is_held_by(owner) {
            return true;
        }
        let tries = self.text(TRIES).and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
        let tries = tries.unwrap_or(0u64) + number(weight);
        self.put(TRIES, Content::Text(tries.to_string().into()), Some(number(memory)));
        if tries >= number(most) {
            return false;
        }
        self.tell("released", number(epoch));
        let waits = matches!(self.content(WAITING), Some(Content::Set(_)));
        let somebody = waits || self.listeners > 1;
        if somebody {
            self.delete([LEASE]);
        }
        somebody
    }

    fn fail(&mut self, arguments: &[&str]) -> bool {
        let [owner, epoch, note, pause] = arguments else { panic!() };
        let epoch = number(epoch);
        let may = match self.text(LEASE) {
            Some(holder) => holder == owner.as_bytes(),
            None => self.last_epoch() == epoch,
        };
        if may {
            self.put(BACKOFF, Content::Text((*note).into()), Some(number(pause)));
            self.delete([LEASE, WAITING, TRIES]);
            self.tell("failed", epoch);
        }
        may
    }

    fn deny(&mut self, arguments: &[&str]) -> bool {
        let ["", digest, memory, most] = arguments else { panic!() };
        let mut denials = self.denials().to_vec();
        if denials.iter().any(|(_, denied)| denied == digest) {
            return false;
        }
        let score = denials.last().map_or(0, |(score, _)| *score) + 1;
        denials.push((score, (*digest).to_owned()));
        let surplus = denials.len().saturating_sub(usize::try_from(number(most)).unwrap());
        self.put(DENIED, Content::Set(denials.split_off(surplus)), Some(number(memory)));
        self.tell("denied", self.last_epoch());
        true
    }

    fn is_held_by(&self, owner: &str) -> bool {
        self.text(LEASE) == Some(owner.as_bytes())
    }

    fn object(&self, key: usize) -> Option<Value> {
        let value: Value = serde_json::from_slice(self.text(key)?).ok()?;
        (value.is_object() || value.is_array()).then_some(value)
    }

    pub(crate) fn fitting_meta(&self) -> Option<Value> {
        let sha1 = ValueId::of(self.text(TOKEN)?);
        self.object(META).filter(|meta| meta["sha1"] == sha1.as_str())
    }

    pub(crate) fn last_epoch(&self) -> u64 {
        let digits = self.text(EPOCH).filter(|text| text.iter().all(u8::is_ascii_digit));
        let epoch = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        epoch.filter(|epoch| *epoch <= MOST).unwrap_or(0)
    }

    fn denials(&self) -> &[(u64, String)] {
        match self.content(DENIED) {
            Some(Content::Set(members)) => members,
            _ => &[],
        }
    }

    pub(crate) fn is_denied(&self, sha256: &Value) -> bool {
        self.denials().iter().any(|(_, denied)| sha256 == denied.as_str())
    }

    fn expire(&mut self, key: usize, life: u64) {
        let ends = self.now + life;
        let immortal = key == LEASE && self.flaw == Flaw::Immortal;
        if let Some(cell) = self.cells.get_mut(&key) {
            cell.ends = Some(ends).filter(|_| !immortal);
        }
    }

    fn tell(&mut self, event: &'static str, epoch: u64) {
        self.told = (self.told.0 + 1, Some((event, epoch)));
    }
}

/// The largest number that is exact in Lua, Redis and JSON alike.
const MOST: u64 = (1 << 53) - 1;

fn whole_number(value: &Value) -> Option<u64> {
    value.as_u64().filter(|number| *number <= MOST)
}

fn epoch_of(meta: &Value) -> u64 {
    whole_number(&meta["epoch"]).unwrap_or(0)
}

fn issued_of(meta: &Value) -> i64 {
    whole_number(&meta["iat"]).and_then(|issued| issued.try_into().ok()).unwrap_or(-1)
}

fn number(text: &str) -> u64 {
    text.parse().unwrap()
}
