//! The client of Neon's management API against a double that misbehaves.

use std::time::{Duration, Instant};

use dynabase::{
    tenant::namespace::Password,
    upstream::neon::api::{Api, ApiError, Compute, NewProject, Quota},
};
use serde_json::json;

use crate::support::{
    block_on,
    neon_double::{KEY, Misdeed, NeonDouble},
};

const SMALL: Compute = Compute { min_cu: 0.25, max_cu: 0.25, suspend_timeout_seconds: 300 };

fn api(double: &NeonDouble, patience: Duration) -> Api {
    Api::new(&double.address, Password::new(KEY), patience).expect("on this machine")
}

fn wanted(name: &str) -> NewProject {
    NewProject {
        name: name.into(),
        org_id: None,
        region_id: Some("aws-eu-central-1".into()),
        pg_version: 17,
        role: "owner".into(),
        database: "app".into(),
        compute: SMALL,
        quota: Quota { logical_size_bytes: 512 << 20, ..Quota::default() },
    }
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_project_is_made_once_whatever_happens_to_the_reply() {
    for misdeeds in [
        &[][..],
        &[Misdeed::Refuse(423), Misdeed::Refuse(503)],
        &[Misdeed::Refuse(429)],
        &[Misdeed::LoseReply],
        &[Misdeed::Gateway],
        &[Misdeed::Refuse(423), Misdeed::LoseReply],
    ] {
        let double = NeonDouble::start();
        misdeeds.iter().for_each(|misdeed| double.misbehave("POST", *misdeed));
        let api = api(&double, LONG);
        let (made, again) = block_on(async {
            // Another project whose name contains this one's.
            api.ensure_project(&wanted("t_acme_2")).await.ok();
            double.counts();
            let made =
                api.ensure_project(&wanted("t_acme")).await.unwrap_or_else(|error| panic!("{misdeeds:?}: {error}"));
            (made, api.ensure_project(&wanted("t_acme")).await.expect("it is there"))
        });
        assert_eq!(double.counts().0, 2, "{misdeeds:?}: {:?}", double.log());
        assert_eq!((&made.project.id, &made.endpoint.host), (&again.project.id, &again.endpoint.host));
        assert_eq!(made.project.settings.quota.logical_size_bytes, 512 << 20);
        assert!(made.endpoint.host.ends_with(".neon.tech"));
    }
}

#[test]
fn what_sets_values_is_sent_again_until_it_is_answered() {
    let double = NeonDouble::start();
    let api = api(&double, LONG);
    block_on(async {
        let made = api.ensure_project(&wanted("t_a")).await.expect("made");
        for misdeed in [Misdeed::LoseReply, Misdeed::Gateway, Misdeed::Refuse(423), Misdeed::Refuse(503)] {
            double.misbehave("PATCH", misdeed);
        }
        let quota = Quota { logical_size_bytes: 1 << 30, compute_time_seconds: 3600, data_transfer_bytes: 0 };
        let large = Compute::new(100, 800, None);
        api.set_quota(&made.project.id, quota, large).await.expect("set");
        api.set_compute(&made.project.id, &made.endpoint.id, large).await.expect("set");
        assert_eq!(api.project(&made.project.id).await.expect("there").settings.quota, quota);
        let endpoint = double.endpoint(0);
        assert_eq!(
            (&endpoint["autoscaling_limit_max_cu"], &endpoint["suspend_timeout_seconds"]),
            (&json!(8.0), &json!(-1))
        );
        api.start(&made.project.id, &made.endpoint.id).await.expect("awake");
        assert_eq!(api.password(&made.project.id, &made.branch, "owner").await.expect("told").expose(), "p");
    });
}

#[test]
fn branches_are_made_once_and_removed_for_good() {
    let double = NeonDouble::start();
    let api = api(&double, LONG);
    block_on(async {
        let made = api.ensure_project(&wanted("t_a")).await.expect("made");
        let (project, root) = (&made.project.id, &made.branch);
        double.misbehave("POST", Misdeed::LoseReply);
        let (branch, endpoint) = api.ensure_branch(project, root, "dev", SMALL).await.expect("made");
        assert_eq!(endpoint.branch_id, branch.id);
        assert_eq!(api.ensure_branch(project, root, "dev", SMALL).await.expect("there").0.id, branch.id);
        assert_eq!(double.counts().1, 2);
        for name in ["b", "c"] {
            api.ensure_branch(project, root, name, SMALL).await.expect("made");
        }
        let no = api.ensure_branch(project, root, "d", SMALL).await.expect_err("one too many");
        assert!(matches!(no, ApiError::Refused { status: 422, ref code, .. } if code == "BRANCHES_LIMIT_EXCEEDED"));
        double.misbehave("DELETE", Misdeed::LoseReply);
        api.delete_branch(project, &branch.id).await.expect("removed");
        api.delete_branch(project, &branch.id).await.expect("removed already");
        assert!(matches!(api.delete_branch(project, root).await, Err(ApiError::Refused { status: 422, .. })));
        api.delete_project(project).await.expect("removed");
        api.delete_project(project).await.expect("removed already");
        assert!(matches!(api.project(project).await, Err(ApiError::NotFound)));
    });
}

#[test]
fn operations_that_fail_late_or_never_end_are_failures() {
    for (misdeed, wanted_status) in [(Misdeed::FailLate, "error"), (Misdeed::Hang, "running")] {
        let double = NeonDouble::start();
        double.misbehave("POST", misdeed);
        let api = api(&double, Duration::from_secs(2));
        let began = Instant::now();
        match block_on(api.ensure_project(&wanted("t_a"))) {
            Err(ApiError::Operation { status, .. }) => assert_eq!(status, wanted_status),
            other => panic!("{misdeed:?}: {other:?}"),
        }
        assert!(began.elapsed() < Duration::from_secs(20), "bounded");
        // A later call does not make a second one.
        let _ = block_on(api.ensure_project(&wanted("t_a")));
        assert_eq!(double.counts().0, 1);
    }
}

#[test]
fn a_lock_that_stays_and_a_wrong_key_are_said() {
    let double = NeonDouble::start();
    for _ in 0..20 {
        double.misbehave("POST", Misdeed::Refuse(423));
    }
    let error = block_on(api(&double, Duration::from_secs(1)).ensure_project(&wanted("t_a"))).expect_err("locked");
    assert!(matches!(error, ApiError::Busy { status: 423 }), "{error}");
    assert_eq!(double.counts().0, 0);
    let wrong = Api::new(&double.address, Password::new("x"), LONG).expect("on this machine");
    let error = block_on(wrong.find_project("t_a")).expect_err("not our key");
    assert!(matches!(error, ApiError::Unauthorized) && !format!("{wrong:?}{error:?}").contains("\"x\""));
    assert!(Api::new("http://console.neon.tech/api/v2", Password::new("x"), LONG).is_err(), "in clear text");
}
