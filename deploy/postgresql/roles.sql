-- Roles with least privilege for PostgreSQL 14 or newer. docs/security.md describes them.
--
-- Run it with psql on the platform's database, as a superuser or as the owner of the database with
-- CREATEROLE. It may be run again: before and after the first `interview-access migrate`, and after
-- each upgrade.
--
--   psql -d DATABASE -f deploy/postgresql/roles.sql
--   psql -d DATABASE -c '\password interview_access_owner'        (and so on for each role)
--   DATABASE_URL=postgresql://interview_access_owner:… interview-access migrate
--   psql -d DATABASE -f deploy/postgresql/roles.sql
--
-- On PostgreSQL 14, and in databases upgraded from it, every role may create tables in the schema public.
-- This file ends that, as newer versions do, and only a superuser can. Grant CREATE first to other
-- roles that create tables there: GRANT CREATE ON SCHEMA public TO service.
--
-- No role has a password until you give it one. If the platform's service owns its tables already,
-- the owner must be a member of the service's role: GRANT service TO interview_access_owner.

\set ON_ERROR_STOP on
\set QUIET on

SELECT format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', name)
FROM unnest(ARRAY['interview_access_owner', 'interview_access_worker',
                  'interview_access_producer', 'interview_access_operator']) AS name
WHERE to_regrole(name) IS NULL
\gexec

-- The owner of a database who is no superuser grants privileges as a member of the tables' owner.
SELECT format('GRANT interview_access_owner TO %I', current_user)
WHERE NOT pg_has_role('interview_access_owner', 'USAGE')
\gexec

GRANT CONNECT ON DATABASE :"DBNAME" TO interview_access_owner, interview_access_worker,
    interview_access_producer, interview_access_operator;
GRANT USAGE ON SCHEMA public TO interview_access_worker, interview_access_producer,
    interview_access_operator;

-- Runs `interview-access migrate`.
GRANT USAGE, CREATE ON SCHEMA public TO interview_access_owner;

REVOKE CREATE ON SCHEMA public FROM PUBLIC;

SELECT to_regclass('grant_access_alembic_version') IS NOT NULL AS is_migrated \gset
\if :is_migrated

-- The worker. UPDATE of one column permits the row lock that prevents the deletion of an interview
-- while it is granted; the worker updates no interview.
GRANT SELECT, UPDATE (id) ON interview_interview TO interview_access_worker;
GRANT SELECT ON interview_interviewconfig TO interview_access_worker;
GRANT INSERT ON interview_interviewattempt TO interview_access_worker;
GRANT SELECT, INSERT ON interview_userinterviewaccess TO interview_access_worker;
GRANT SELECT, INSERT ON grant_access_job TO interview_access_worker;
GRANT SELECT, UPDATE (sent_at, look_at), DELETE ON grant_access_request TO interview_access_worker;
GRANT SELECT, INSERT ON grant_access_cancellation TO interview_access_worker;
GRANT SELECT, INSERT, UPDATE ON grant_access_rejection TO interview_access_worker;
GRANT SELECT, INSERT, UPDATE ON grant_access_cohort TO interview_access_worker;
GRANT SELECT ON grant_access_tombstone TO interview_access_worker;
GRANT SELECT ON grant_access_alembic_version TO interview_access_worker;

-- Workers with GRANT_RETENTION_DAYS, which prune: run this file with `psql -v retention=on`.
\if :{?retention}
GRANT DELETE ON grant_access_job TO interview_access_worker;  -- to prune
GRANT INSERT ON grant_access_tombstone TO interview_access_worker;  -- to prune
GRANT DELETE ON grant_access_cancellation TO interview_access_worker;  -- to prune
GRANT DELETE ON grant_access_rejection TO interview_access_worker;  -- to prune
GRANT DELETE ON grant_access_cohort TO interview_access_worker;  -- to prune
\endif

-- An old Django gives a table a sequence of its own.
SELECT format('GRANT USAGE ON SEQUENCE %s TO interview_access_worker', sequence)
FROM pg_get_serial_sequence('interview_userinterviewaccess', 'id') AS sequence
WHERE sequence IS NOT NULL
\gexec

-- A service that requests jobs in its transactions. It reads job IDs and digests, by which a repeated
-- request is recognized, and nothing else.
GRANT INSERT (job_id, task, user_id, user_ids, interview_ids, eta, expires_at, digest, headers),
    SELECT (job_id, digest) ON grant_access_request TO interview_access_producer;

-- An operator: reads, and writes nothing.
GRANT SELECT ON interview_interview, interview_interviewconfig, interview_interviewattempt,
    interview_userinterviewaccess, grant_access_job, grant_access_request,
    grant_access_cancellation, grant_access_rejection, grant_access_cohort,
    grant_access_tombstone, grant_access_alembic_version TO interview_access_operator;

\else
\echo 'The tables are missing: run interview-access migrate as interview_access_owner, then this file again.'
\endif
