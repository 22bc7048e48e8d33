//! The scripts against their model: the same random calls to both, in between
//! what other programs and accidents do to the keys, and after each call the
//! same answer and the same keys.

use fastrand::Rng;
use redis::{Pipeline, pipe};
use serde_json::json;

use super::fleet::Answer as EntranceAnswer;
use super::model::{
    Answer, BACKOFF, COOKIES, Content, DENIED, EPOCH, LEASE, META, Model, TOKEN, TRIES, UNVERIFIED,
    WAITING,
};
use super::tests::Server;
use super::*;

const SEQUENCES: u64 = 60;
const CALLS: usize = 60;
/// Times to live lie further apart than this, and a sequence lasts less.
const TOLERANCE_MS: i64 = 50_000;
const LIVES_S: [u64; 3] = [200, 400, 600];
const KEYS: [usize; 10] =
    [TOKEN, COOKIES, META, LEASE, EPOCH, UNVERIFIED, BACKOFF, DENIED, TRIES, WAITING];
/// What was never meant to lie there.
const GARBAGE: [&str; 16] = [
    "1e26",
    "inf",
    "nan",
    "-3",
    "0x10",
    "99999999999999999999",
    "",
    "x",
    "{",
    "[]",
    "[1]",
    "null",
    "1",
    "\"a\"",
    r#"{"sha1":null,"epoch":"7","iat":[]}"#,
    r#"{"token":1,"sha256":2}"#,
];

/// Makes calls of a small world, so that they meet.
struct Dice(Rng);

impl Dice {
    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.0.usize(..choices.len())]
    }

    fn owner(&mut self) -> String {
        self.of(&["a", "b", "c"]).to_owned()
    }

    fn epoch(&mut self) -> String {
        self.0.u64(0..6).to_string()
    }

    /// A token and its `iat`, which another one may share; now and then it has none.
    fn token(&mut self) -> (String, String) {
        let number = self.0.u64(1..4);
        let issued = if number == 3 { String::new() } else { number.to_string() };
        (format!("token-{number}{}", self.of(&["a", "b"])), issued)
    }

    fn life_ms(&mut self) -> String {
        (LIVES_S[self.0.usize(..3)] * 1000).to_string()
    }

    fn note(&mut self, token: &str, issued: &str) -> serde_json::Value {
        let mut note = json!({ "sha256": format!("sha-{token}"), "verified": self.0.u8(..4) > 0 });
        if let Ok(issued) = issued.parse::<u64>() {
            note["iat"] = issued.into();
        }
        note
    }

    fn call(&mut self) -> Call {
        let operation = [
            Operation::Enter,
            Operation::Enter,
            Operation::Renew,
            Operation::Release,
            Operation::Commit,
            Operation::Commit,
            Operation::Share,
            Operation::HandOn,
            Operation::Fail,
            Operation::Deny,
        ][self.0.usize(..10)];
        let arguments = match operation {
            Operation::Enter => self.enter(),
            Operation::Renew => vec![self.owner(), self.life_ms()],
            Operation::Release => vec![self.owner()],
            Operation::Commit => self.commit(),
            Operation::Share => self.share(),
            Operation::HandOn => {
                let weight = self.of(&["1", "2"]).to_owned();
                vec![self.owner(), self.epoch(), weight, "5".into(), self.life_ms()]
            }
            Operation::Fail => self.fail(),
            Operation::Deny => {
                let token = self.token().0;
                let most = self.of(&["2", "256"]).to_owned();
                vec![String::new(), format!("sha-{token}"), self.life_ms(), most]
            }
        };
        Call { operation, arguments }
    }

    fn enter(&mut self) -> Vec<String> {
        let wish = self.of(&["none", "routine", "needed", "force"]).to_owned();
        let pause = self.life_ms();
        let (epoch, waiting) = (self.epoch(), self.life_ms());
        let mut arguments = vec![self.owner(), self.life_ms(), wish, epoch, pause, waiting];
        for _ in 0..self.0.usize(..4) {
            arguments.push(sha1_hex(self.token().0.as_bytes()));
        }
        arguments
    }

    fn commit(&mut self) -> Vec<String> {
        let owner = if self.0.bool() { String::new() } else { self.owner() };
        let (token, issued) = self.token();
        let note = self.note(&token, &issued).to_string();
        let life = LIVES_S[self.0.usize(..3)].to_string();
        let seen = if self.0.bool() { String::new() } else { sha1_hex(self.token().0.as_bytes()) };
        vec![
            owner,
            self.epoch(),
            token.clone(),
            format!("{{\"{token}\"}}"),
            note,
            life,
            issued,
            seen,
        ]
    }

    fn share(&mut self) -> Vec<String> {
        let (owner, epoch, (token, issued)) = (self.owner(), self.epoch(), self.token());
        let mut note = self.note(&token, &issued);
        note["token"] = token.clone().into();
        note["epoch"] = epoch.parse::<u64>().unwrap().into();
        let life = LIVES_S[self.0.usize(..3)].to_string();
        let sha1 = sha1_hex(token.as_bytes());
        vec![owner, epoch, note.to_string(), life, issued, sha1]
    }

    fn fail(&mut self) -> Vec<String> {
        let note = json!({ "error": "e", "routine": self.0.bool() }).to_string();
        vec![self.owner(), self.epoch(), note, self.life_ms()]
    }

    /// What somebody else does to a key, or its end.
    fn accident(&mut self) -> (usize, Option<Content>) {
        let key = KEYS[self.0.usize(..KEYS.len())];
        let content = match self.0.u8(..4) {
            0 => None,
            1 => Some(Content::List),
            2 if key == TOKEN => Some(Content::Text(self.token().0.into())),
            _ => Some(Content::Text(self.of(&GARBAGE).into())),
        };
        (key, content)
    }
}

#[tokio::test]
async fn the_scripts_and_their_model_agree() {
    let server = Server::start(&[]).await;
    let store = server.store();
    for seed in 0..SEQUENCES {
        let _: () = server.command(&["FLUSHALL"]).await;
        sequence(&store, seed).await;
    }
}

async fn sequence(store: &RedisStore, seed: u64) {
    let (mut dice, mut model) = (Dice(Rng::with_seed(seed)), Model::default());
    let started = std::time::Instant::now();
    for step in 0..CALLS {
        model.advance(u64::try_from(started.elapsed().as_millis()).unwrap());
        let place = format!("seed {seed}, step {step}");
        if dice.0.u8(..6) == 0 {
            let (key, content) = dice.accident();
            befall(store, &mut model, key, content).await;
        }
        let call = dice.call();
        let expected = model.run(&call);
        let answer = answer(store, call.clone()).await;
        assert!(alike(&answer, &expected), "{place}: {call:?}\n{answer:?}\n{expected:?}");
        compare(store, &model, &format!("{place}: {call:?}")).await;
    }
}

async fn befall(store: &RedisStore, model: &mut Model, key: usize, content: Option<Content>) {
    let name = &store.keys.names()[key];
    let mut commands = pipe();
    commands.cmd("DEL").arg(name).ignore();
    match &content {
        Some(Content::Text(text)) => commands.cmd("SET").arg(name).arg(text).ignore(),
        Some(_) => commands.cmd("RPUSH").arg(name).arg("x").ignore(),
        None => &mut commands,
    };
    run(store, &commands).await;
    match content {
        Some(content) => model.put(key, content, None),
        None => model.delete([key]),
    }
}

async fn run(store: &RedisStore, commands: &Pipeline) {
    let _: redis::Value = store.link.run(commands).await.unwrap();
}

async fn answer(store: &RedisStore, call: Call) -> Answer {
    match call.operation {
        Operation::Enter => {
            let answer: EntranceAnswer = store.call(call).await.unwrap();
            Answer::Entrance(Box::new(answer.into()))
        }
        Operation::Commit | Operation::Share => {
            let answer: String = store.call(call).await.unwrap();
            committed(&answer).unwrap();
            let known = ["committed", "lost", "fenced", "older", "foreign"];
            Answer::Outcome(known.into_iter().find(|known| *known == answer).unwrap())
        }
        _ => Answer::Truth(store.call(call).await.unwrap()),
    }
}

/// Equal but for the time that has passed in one of them.
fn alike(answer: &Answer, expected: &Answer) -> bool {
    let (Answer::Entrance(answer), Answer::Entrance(expected)) = (answer, expected) else {
        return answer == expected;
    };
    let mut answer = answer.clone();
    if answer.backoff_ms.abs_diff(expected.backoff_ms) < 50_000 {
        answer.backoff_ms = expected.backoff_ms;
    }
    if answer.state == "held" && answer.detail.abs_diff(expected.detail) < 50_000 {
        answer.detail = expected.detail;
    }
    answer == *expected
}

fn near(left: i64, expected: i64) -> bool {
    left.signum() == expected.signum() && (left - expected).abs() < TOLERANCE_MS
}

async fn compare(store: &RedisStore, model: &Model, place: &str) {
    let texts = KEYS.map(|key| model.text(key).map(<[u8]>::to_vec)).to_vec();
    let mut commands = pipe();
    commands.cmd("MGET").arg(store.keys.names());
    for name in store.keys.names() {
        commands.cmd("PTTL").arg(name);
    }
    let (found, left) = split(store.link.run(&commands).await.unwrap());
    assert_eq!(found, texts, "{place}");
    for (key, left) in KEYS.into_iter().zip(left) {
        assert!(near(left, model.left(key)), "{place}: key {key}: {left} {}", model.left(key));
    }
    for key in [DENIED, WAITING] {
        let Some(Content::Set(members)) = model.content(key) else { continue };
        let mut commands = pipe();
        commands.cmd("ZRANGE").arg(&store.keys.names()[key]).arg(0).arg(-1).arg("WITHSCORES");
        let (found,): (Vec<(String, u64)>,) = store.link.run(&commands).await.unwrap();
        let expected: Vec<_> =
            members.iter().map(|(score, member)| (member.clone(), *score)).collect();
        assert_eq!(found, expected, "{place}");
    }
}

type Texts = Vec<Option<Vec<u8>>>;

fn split(answer: redis::Value) -> (Texts, Vec<i64>) {
    let redis::Value::Array(mut answers) = answer else { panic!("{answer:?}") };
    let left = answers.split_off(1);
    let texts = redis::from_redis_value(answers.remove(0)).unwrap();
    (texts, left.into_iter().map(|left| redis::from_redis_value(left).unwrap()).collect())
}

/// A script that has run and whose answer was lost is run once more.
#[tokio::test]
async fn a_script_that_runs_twice_answers_as_it_did_at_first() {
    let server = Server::start(&[]).await;
    let store = server.store();
    let request =
        |owner: &str, wish| Request { owner: Owner::named(owner), wish, known: Vec::new() };
    let mut first = store.enter(&request("a", Wish::Needed), 0).await.unwrap();
    let again = store.enter(&request("a", Wish::Needed), 0).await.unwrap();
    assert_eq!((first.turn, again.turn), (Standing::Granted { epoch: 1 }, first.turn));
    let lease = Lease { owner: Owner::named("a"), epoch: 1 };
    let now = Timestamp(1_000_000);
    let published = super::tests::published(true);
    for _ in 0..2 {
        let committed = store.commit(&published, Some(&lease), None, now).await.unwrap();
        assert_eq!(committed, Commit::Committed);
    }
    first = store.enter(&request("b", Wish::Force), 0).await.unwrap();
    assert_eq!(first.turn, Standing::Granted { epoch: 2 });
    let stale = store.commit(&published, Some(&Lease { epoch: 0, ..lease }), None, now).await;
    assert_eq!(stale.unwrap(), Commit::Lost);
    assert!(!store.renew(&Owner::named("a")).await.unwrap());
}

/// What somebody may type by hand must neither fail an answer nor last for ever.
#[tokio::test]
async fn odd_numbers_and_what_should_lapse_do_no_lasting_harm() {
    let server = Server::start(&[]).await;
    let store = server.store();
    let [epoch, meta, backoff, denied, unverified] =
        [EPOCH, META, BACKOFF, DENIED, UNVERIFIED].map(|key| store.keys.names()[key].clone());
    let enter = async |owner: &str| {
        let owner = Owner::named(owner);
        let request = Request { owner: owner.clone(), wish: Wish::Force, known: Vec::new() };
        let entrance = store.enter(&request, 0).await.unwrap();
        assert!(store.release(&owner).await.unwrap());
        entrance
    };
    for odd in ["inf", "nan", "1e26", "1e300", "-7", "9999999999999999"] {
        let _: () = server.command(&["SET", &epoch, odd]).await;
        assert_eq!(enter(odd).await.turn, Standing::Granted { epoch: 1 }, "{odd}");
        let _: () = server.command(&["SET", "chitai_gorod_token", "x"]).await;
        let fitting = format!("{{\"sha1\":\"{}\",\"epoch\":{odd}}}", sha1_hex(b"x"));
        let _: () = server.command(&["SET", &meta, &fitting]).await;
        assert_eq!(enter(odd).await.turn, Standing::Granted { epoch: 2 }, "{odd}");
    }
    for score in ["inf", "-inf", "1.5", "1e300"] {
        let _: () = server.command(&["ZADD", &denied, score, "odd"]).await;
        enter(score).await;
    }
    let token = crate::token::test_support::token(5);
    assert!(store.deny(&token).await.unwrap());
    let denials = enter("after").await.denials;
    assert_eq!((denials.last, denials.digests), (1, vec![*token.digest()]));
    for life in [None, Some("9999999999999")] {
        let _: () = server.command(&["SET", &backoff, "{}"]).await;
        if let Some(life) = life {
            let _: () = server.command(&["PEXPIRE", &backoff, life]).await;
        }
        let left = enter("late").await.backoff.unwrap().left;
        assert_eq!(left, Duration::from_mins(11));
    }
    let _: () = server.command(&["SET", &unverified, r#"{"token":"of another release"}"#]).await;
    let entrance = enter("new").await;
    assert_eq!(entrance.unverified_value, Some(ValueId::of(b"of another release")));
    assert!(entrance.unverified.is_none());
}
